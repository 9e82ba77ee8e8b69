"""Server-sent events: one `data:` line per event, `[DONE]` at the end."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.types import Receive, Scope, Send

from quartet.http_gateway.http import errors
from quartet.http_gateway.ring.flight import ClientGone
from quartet.runtime.errors import Kind, RequestError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),  # a proxy that compresses would hold events back
    (b"x-accel-buffering", b"no"),  # the same for nginx, which buffers answers by default
]


def event(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


class EventStream:
    """A response that streams events.

    The headers wait for the first event, so that a request that is refused gets a real status; an error after that
    is told inside the stream.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failed: Callable[[RequestError], bytes] = errors.stream_event,
    ) -> None:
        """`failed`: what tells an error inside the stream."""
        self._events = events
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async with aclosing(self._told(events)) as told:
                async for chunk in told:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _told(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The events; what ends them early is the last one."""
        try:
            async for chunk in events:
                yield chunk
        except RequestError as error:
            log.info("a stream ended with an error: %s", error.message)
            yield event(self._failed(error))
        except ClientGone:
            raise
        except Exception as error:
            log.exception("a stream failed")
            yield event(self._failed(RequestError(f"Internal error: {type(error).__name__}", Kind.INTERNAL)))
