"""Requests that offer another protocol, as every client of Java's own library does (`Upgrade: h2c`), and are answered
in this one (RFC 9110, 7.8).

The parser takes such a request to be over with its head: what follows is of the other protocol. Its body would be lost,
and read as the next request. So another parser goes on at the body.
"""

from collections.abc import Sequence
from typing import Protocol

import httptools

FRAMING = (b"content-length", b"transfer-encoding")  # which say that there is a body, and how long it is


class Connection(Protocol):
    """What a parser tells."""

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


class BehindHead:
    """Passes on what a parser tells, but for its first head, which is known."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._behind = False

    def on_message_begin(self) -> None:
        if self._behind:
            self._connection.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._behind:
            self._connection.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._behind:
            self._connection.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._behind:
            self._connection.on_headers_complete()
        self._behind = True

    def on_body(self, body: bytes) -> None:
        self._connection.on_body(body)

    def on_message_complete(self) -> None:
        self._connection.on_message_complete()


def has_body(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    return any(name in FRAMING for name, _ in headers)


def parser_at_body(connection: Connection, headers: Sequence[tuple[bytes, bytes]]) -> httptools.HttpRequestParser:
    """A parser that stands where the body of a request with these headers begins. Raises HttpParserError.

    A body of no bytes is complete at once.
    """
    parser = httptools.HttpRequestParser(BehindHead(connection))
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
    framing = b"".join(b"%b: %b\r\n" % header for header in headers if header[0] in FRAMING)
    parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n")
    return parser
