"""Server-sent events: one `data:` line per event, `[DONE]` at the end."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.types import Receive, Scope, Send

from http_gateway import errors
from runtime.errors import RequestError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


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
            try:
                async for chunk in events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except RequestError as error:
                log.info("a stream ended with an error: %s", error.message)
                await send({"type": "http.response.body", "body": event(self._failed(error)), "more_body": True})
            await send({"type": "http.response.body", "body": DONE, "more_body": False})
