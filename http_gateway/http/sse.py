"""Server-sent events: one `data:` line per event, and what ends a stream."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import NamedTuple

from starlette.types import Message, Receive, Scope, Send

from quartet.http_gateway.http import errors
from quartet.http_gateway.ring.request_group import ClientGone
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import STREAM_PING_S

log = logging.getLogger(__name__)

SEND_PART = "quartet.send_part"  # scope key: the server's own `send`, past the middlewares, which change headers only
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),  # a proxy that compresses would hold events back
    (b"x-accel-buffering", b"no"),  # the same for nginx, which buffers answers by default
]


class Event(NamedTuple):
    """One event: its data, JSON without line ends, and its type where it has one."""

    data: bytes
    type: bytes = b""


def frame(event: Event) -> bytes:
    """The bytes of an event on the wire."""
    if event.type:
        return b"event: %b\ndata: %b\n\n" % (event.type, event.data)
    return b"data: %b\n\n" % event.data


def frames(events: Iterable[Event]) -> bytes:
    """The bytes of events that are sent together."""
    return b"".join(map(frame, events))


def part_of(body: bytes) -> Message:
    """The message that sends a part of an answer."""
    return {"type": "http.response.body", "body": body, "more_body": True}


class StreamFormat(NamedTuple):
    """What the streams of an API have besides their events."""

    error_json: Callable[[RequestError], bytes] = errors.stream_event  # the data of the event that reports an error
    error_type: bytes = b""  # of that event
    end: bytes = DONE
    headers: Mapping[str, str] = {}
    ping: Event | None = None  # sent where nothing else was for so many seconds
    ping_interval_s: float = STREAM_PING_S


NATIVE = StreamFormat()
OPENAI = StreamFormat(errors.openai_stream_event)


class EventStream:
    """A response that streams events.

    The headers wait for the first event, so that a request that is refused gets a real status; an error after that
    becomes an event of the stream.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], form: StreamFormat = NATIVE) -> None:
        """`chunks`: frames of one or more events each."""
        self._chunks = chunks
        self._form = form
        self._sent = False  # something, since the last look

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send_part: Send = scope.get(SEND_PART, send)
        async with aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
            await send_part(part_of(first))
            async with self._pings(send_part):
                await self._send_rest(chunks, send_part)
            await send({"type": "http.response.body", "body": self._form.end, "more_body": False})

    @asynccontextmanager
    async def _pings(self, send: Send) -> AsyncIterator[None]:
        """Inside the block, pings are sent while nothing else is: proxies and clients give up silent connections."""
        if self._form.ping is None:
            yield
            return
        pinging = asyncio.create_task(self._ping(send, part_of(frame(self._form.ping))))
        try:
            yield
        finally:
            pinging.cancel()

    async def _ping(self, send: Send, ping: Message) -> None:
        """Send a ping after each interval in which nothing else was sent, for ever."""
        while True:
            self._sent = False
            await asyncio.sleep(self._form.ping_interval_s)
            if not self._sent:
                await send(ping)

    async def _send_rest(self, chunks: AsyncGenerator[bytes, None], send: Send) -> None:
        """Send the chunks; an error that ends them early becomes the last event."""
        try:
            async for chunk in chunks:
                self._sent = True
                await send(part_of(chunk))
        except RequestError as error:
            log.info("a stream ended with an error: %s", error.message)
            await send(part_of(self._error_frame(error)))
        except ClientGone:
            raise
        except Exception as error:
            log.exception("a stream failed")
            await send(
                part_of(self._error_frame(RequestError(f"Internal error: {type(error).__name__}", Kind.INTERNAL)))
            )

    def _error_frame(self, error: RequestError) -> bytes:
        return frame(Event(self._form.error_json(error), self._form.error_type))

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return HEADERS + [(name.encode(), value.encode("latin-1")) for name, value in self._form.headers.items()]
