"""uvicorn's HTTP/1.1 protocol with bounds on what a client may hold without sending or reading.

head    has so many bytes and takes so long; a connection that sends nothing is closed like an idle one
trailer has as many bytes as a head, and so have the extensions of a chunk
body    arrives at a least rate, with some seconds in hand; time in which the server does not read is not the client's
answer  is read at a least rate: a client that reads nothing for a minute is cut off, and its request ends
many    requests in one write are parsed a few at a time, as their forerunners are answered

A target in absolute form names the host instead of the Host header (RFC 9112, 3.2.2). A request that offers another
protocol is answered in this one.
"""

import asyncio
import re
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quartet.http_gateway.http.connection_limit import ConnectionLimit, monitors_only
from quartet.http_gateway.http.declined_upgrade import has_body, parser_at_body
from quartet.runtime.limits import BODY_GRACE_S, HEADER_DEADLINE_S, LEAST_BODY_RATE, MAX_HEADER_BYTES, READ_STALL_S

TOO_LARGE = b"431 Request Header Fields Too Large"
TOO_SLOW = b"408 Request Timeout"
ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")  # a target as proxies get it, which names its own host
PIECE_BYTES = 1024  # handed to the parser at once, where requests may begin in it: each one costs some kilobytes
MOST_PIPELINED = 8  # parsed requests that wait for an earlier one's answer, but for the others of their piece
LAST_CHANCE_S = 1.0  # for what has come and was not read, because the server itself stood still
CONTENT_LENGTH = b"content-length"
INVALID = "Invalid HTTP request received."


class Flow(FlowControl):
    """Flow control that keeps reading paused while bytes are held back, even when it is to be resumed."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._held = False
        self._resume_on_release = False  # reading was to go on while bytes were held back

    def hold(self) -> None:
        if not self._held:
            self._held, self._resume_on_release = True, not self.read_paused
            super().pause_reading()

    def release(self) -> None:
        if self._held:
            self._held = False
            if self._resume_on_release:
                super().resume_reading()

    def pause_reading(self) -> None:
        self._resume_on_release = False
        super().pause_reading()

    def resume_reading(self) -> None:
        if self._held:
            self._resume_on_release = True
        else:
            super().resume_reading()


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    flow: Flow

    def __init__(self, *arguments: Any, connection_limit: ConnectionLimit | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._connection_limit = connection_limit or ConnectionLimit()
        self._held = bytearray()  # not parsed yet
        self._heads = 0  # that have begun
        self._head_bytes = 0
        self._in_head = False
        self._in_body = False
        self._declines = False  # the parser stops at this head, though a body follows
        self._body_left = 0  # as far as its length was announced
        self._body_bytes = 0
        self._body_began = 0.0
        self._framing_bytes = 0  # of a chunked body, since the last byte of the body itself
        self._late = False
        self._deadline: asyncio.TimerHandle | None = None  # of what is to arrive
        self._stall: asyncio.TimerHandle | None = None  # of what is to be read

    # connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport)
        if not self._connection_limit.add(self):
            self.app = monitors_only(self.app)
        self._arm(self.timeout_keep_alive, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection_limit.remove(self)
        self._disarm()
        self._end_stall()
        self._held.clear()
        super().connection_lost(exc)

    def close_now(self) -> None:
        """Close at once: the connection limit is reached."""
        self.transport.abort()

    # what arrives

    def data_received(self, data: bytes) -> None:
        self._held += data
        self._parse()

    def _parse(self) -> None:
        """Hand what is held back to the parser, until enough requests wait for their turn."""
        while self._held and not self.transport.is_closing():
            if len(self.pipeline) >= MOST_PIPELINED:
                self.flow.hold()
                return
            size = max(PIECE_BYTES, self._body_left)
            piece = bytes(self._held[:size])
            del self._held[:size]
            self._parse_piece(piece)
        if self.transport.is_closing():
            self._held.clear()
        self.flow.release()

    def _parse_piece(self, piece: bytes) -> None:
        """What begins in a piece, a head or a trailer, has fewer bytes than that in it; it is counted from the next on.

        The extensions of a chunk and the trailer behind the last one are bounded as heads are: the parser joins them
        in quadratic time, and time for a body is given by the bytes of the body.
        """
        head = self._heads if self._in_head else -1
        body = self._heads if self._in_body else -1
        self._framing_bytes += len(piece)
        self._hand_over(piece)
        if self._in_head and self._heads == head:
            self._head_bytes += len(piece)
        if not (self._in_body and self._heads == body):
            self._framing_bytes = 0
        if max(self._head_bytes, self._framing_bytes) > MAX_HEADER_BYTES:
            self._refuse(TOO_LARGE)

    def _hand_over(self, piece: bytes) -> None:
        """Have the parser read a piece. One that stops at the offer of another protocol is led on."""
        self._unset_keepalive_if_required()
        try:
            while piece:
                try:
                    self.parser.feed_data(piece)
                    return
                except httptools.HttpParserUpgrade as offer:
                    piece = piece[offer.args[0] :]
                    if self._declines:
                        self._declines = False
                        self.parser = parser_at_body(self, self.headers)
        except httptools.HttpParserError:
            self.logger.warning(INVALID)
            self.send_400_response(INVALID)

    def _should_upgrade(self) -> bool:
        return False  # there is no other protocol here

    def on_message_begin(self) -> None:
        self._connection_limit.set_idle(self, idle=False)
        self._in_head, self._head_bytes = True, 0
        self._heads += 1
        self._arm(HEADER_DEADLINE_S, self._too_slow)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is there: start the clock of the body, and take the host of an absolute target."""
        self._in_head, self._in_body = False, True
        self._declines = bool(self.parser.should_upgrade()) and has_body(self.headers)
        self._head_bytes = 0
        length = next((value for name, value in self.headers if name == CONTENT_LENGTH), b"")
        self._body_left = int(length) if length.isdigit() else 0
        self._body_bytes, self._body_began, self._late = 0, self.loop.time(), False
        self._arm(BODY_GRACE_S, self._look_at_body)
        if (named := ABSOLUTE.match(self.url)) and sum(name == b"host" for name, _ in self.headers) < 2:
            self.headers[:] = [header for header in self.headers if header[0] != b"host"]  # which does not count then
            self.headers.append((b"host", named[1]))
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        self._body_bytes += len(body)
        self._body_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there, unless the parser only stopped at an offer: then its body is still to come."""
        if self._declines:
            return
        self._in_body, self._body_left = False, 0
        self._disarm()
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:  # it was answered before its body had come
            self._connection_limit.set_idle(self, idle=True)
            self._arm(self.timeout_keep_alive, self._too_slow)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._parse()
        if not (self._in_head or self._in_body or self.pipeline or self._held):
            self._connection_limit.set_idle(self, idle=True)

    def _look_at_body(self) -> None:
        """The time that a body may take has passed, for as much of it as had come when it was set."""
        now = self.loop.time()
        if self.flow.read_paused or (self.cycle and self.cycle.waiting_for_100_continue):  # it could not come
            self._body_began, self._body_bytes = now, 0
        due_at = self._body_began + BODY_GRACE_S + self._body_bytes / LEAST_BODY_RATE
        if now < due_at:
            self._late = False
            self._arm(due_at - now, self._look_at_body)
        elif not self._late:
            self._late = True
            self._arm(LAST_CHANCE_S, self._look_at_body)
        else:
            self._refuse(TOO_SLOW)

    def _too_slow(self) -> None:
        if self.flow.read_paused:  # the rest of the head waits for our own answers
            self._arm(HEADER_DEADLINE_S, self._too_slow)
        else:
            self._refuse(TOO_SLOW)

    def _arm(self, seconds: float, then: Any) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: bytes) -> None:
        """Close; say why where that cannot be taken for a part of another answer."""
        self._in_head = self._in_body = False
        self._disarm()
        if self.transport.is_closing():
            return
        if self._silent:
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()

    @property
    def _silent(self) -> bool:
        """Nothing is being answered, nor waits for it."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline)

    # what is to be read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_stall()
        self._stall = self.loop.call_later(READ_STALL_S, self._cut_off)

    def resume_writing(self) -> None:
        self._end_stall()
        super().resume_writing()

    def _cut_off(self) -> None:
        """The client has not read what the buffer holds: end the connection, and with it the request."""
        self.logger.warning("A client does not read its answer; its connection is cut off.")
        self.transport.abort()

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
