"""Server-sent events: one `data:` line per event, and what ends a stream."""

import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from quartet.http_gateway.http import errors
from quartet.http_gateway.ring.request_group import ClientGone
from quartet.runtime.errors import Kind, RequestError

log = logging.getLogger(__name__)

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
    name = b"event: " + event.type + b"\n" if event.type else b""
    return name + b"data: " + event.data + b"\n\n"


def frames(events: Iterable[Event]) -> bytes:
    """The bytes of events that are sent together."""
    return b"".join(map(frame, events))


class StreamFormat(NamedTuple):
    """What the streams of an API have besides their events."""

    error_json: Callable[[RequestError], bytes] = errors.stream_event  # the data of the event that reports an error
    error_type: bytes = b""  # of that event
    end: bytes = DONE
    headers: Mapping[str, str] = {}


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async with aclosing(self._with_error(chunks)) as rest:
                async for chunk in rest:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": self._form.end, "more_body": False})

    async def _with_error(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The chunks; an error that ends them early becomes the last event."""
        try:
            async for chunk in chunks:
                yield chunk
        except RequestError as error:
            log.info("a stream ended with an error: %s", error.message)
            yield self._error_frame(error)
        except ClientGone:
            raise
        except Exception as error:
            log.exception("a stream failed")
            yield self._error_frame(RequestError(f"Internal error: {type(error).__name__}", Kind.INTERNAL))

    def _error_frame(self, error: RequestError) -> bytes:
        return frame(Event(self._form.error_json(error), self._form.error_type))

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return HEADERS + [(name.encode(), value.encode("latin-1")) for name, value in self._form.headers.items()]
