"""uvicorn's HTTP/1.1 protocol with bounds on the head of a request, which the parser itself has not.

A head may have so many bytes and take so long; a connection that sends nothing is closed like an idle one. Without
this a header without end is kept in memory, and half-open requests are held for ever. A target in absolute form names
the host instead of the Host header (RFC 9112, 3.2.2).
"""

import asyncio
import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from runtime.limits import HEADER_DEADLINE_S, MAX_HEADER_BYTES

TOO_LARGE = b"431 Request Header Fields Too Large"
TOO_SLOW = b"408 Request Timeout"
ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")  # a target as proxies get it, which names its own host


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    _in_head = False
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        goes_on = self._in_head  # else the head that may begin here shares its bytes with a body before it
        super().data_received(data)
        if goes_on and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES:
                self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._arm(HEADER_DEADLINE_S)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._disarm()
        if (named := ABSOLUTE.match(self.url)) and sum(name == b"host" for name, _ in self.headers) < 2:
            self.headers[:] = [header for header in self.headers if header[0] != b"host"]  # which does not count then
            self.headers.append((b"host", named[1]))
        super().on_headers_complete()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._refuse, TOO_SLOW)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: bytes) -> None:
        self._in_head = False
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
