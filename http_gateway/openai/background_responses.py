"""Responses that are generated in the background: nobody waits for them, their clients ask for them by their id.

While one runs, its state is in this process. The store has it from the beginning on as one that has failed because the
server ended: what is true as soon as nobody overwrites it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.generation.run_group import raise_failure
from quartet.http_gateway.http import errors
from quartet.http_gateway.http.call_record import CALL, CallRecord
from quartet.http_gateway.http.sse import EventStream, StreamFormat
from quartet.http_gateway.openai.response_call import ResponseCall, ResponseStream, described
from quartet.http_gateway.openai.response_items import IN_PROGRESS, QUEUED
from quartet.http_gateway.ring.request_group import RequestDelta, RequestGroup
from quartet.http_gateway.routes.background_runs import BackgroundRun
from quartet.http_gateway.routes.event_log import EventLog
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.errors import Kind, RequestError

log = logging.getLogger(__name__)


class BackgroundResponse:
    """One response on its way."""

    def __init__(self, gateway: Gateway, call: ResponseCall, record: CallRecord | None = None) -> None:
        """`record`: of the HTTP call that has begun it; it ends with the response."""
        self._record = record
        if record is not None:
            record.goes_on = True
            record.sent(call.chat.job.requests)
        self._logs = gateway.event_logs
        self._call = call
        self._status = QUEUED
        self._stream = ResponseStream(call)
        self.events: EventLog | None = None  # where the client wants a stream
        if call.body.stream:
            self.events = self._logs.open(call.id)
            self._logs.add(self.events, self._stream.queued_events())

    def response(self) -> dict[str, Any]:
        """The response object as it is now."""
        return self._call.response(self._status)

    async def generate(self, group: RequestGroup) -> None:
        """Take what comes of the request. Raises RequestError where it fails; cancelled, it aborts the request."""
        with group:
            while not group.finished:
                deltas = await group.next()
                if self._record is not None:
                    self._record.heard(deltas)
                raise_failure(deltas, self._call.chat.job.names)
                self._take(deltas)

    def _take(self, deltas: list[RequestDelta]) -> None:
        self._status = IN_PROGRESS
        if self.events is not None:
            self._logs.add(self.events, self._stream.events(deltas))
            return
        for index, text in deltas:
            self._call.chat.take(index, text)

    async def end(self, error: BaseException | None) -> None:
        """The request is over: the response is kept, and its stream ends."""
        match error:
            case None:
                pass
            case asyncio.CancelledError():
                self._call.cancel()
            case RequestError():
                self._call.fail(error)
            case _:
                log.error("Background response %s has failed.", self._call.id, exc_info=error)
                self._call.fail(RequestError(f"Internal error: {type(error).__name__}", Kind.INTERNAL))
        if self.events is None:
            self._call.take_whole()
        if self._record is not None:
            self._record.end()
        await self._call.end()
        self._status = self._call.status()
        if self.events is not None:
            self._logs.add(self.events, self._stream.last_events())
            self._logs.end(self._call.id)


async def begin(gateway: Gateway, http: HTTPRequest, call: ResponseCall) -> Response | EventStream:
    """Start a response, and answer with its first state or with its stream. Raises RequestError."""
    if not call.stored:
        raise RequestError("background needs store to be true: the response is kept to be asked for.", field="store")
    gateway.background.reserve(call.id, call.size())
    try:
        group = await opened(gateway, call)
    except BaseException:
        gateway.background.release(call.id)
        raise
    background = BackgroundResponse(gateway, call, http.scope.get(CALL))
    first = background.response()
    gateway.background.add(call.id, BackgroundRun(background.response, background.generate(group), background.end))
    return (
        errors.json_response(first, headers=call.headers)
        if background.events is None
        else follow(http, background.events, headers=call.headers)
    )


async def opened(gateway: Gateway, call: ResponseCall) -> RequestGroup:
    """The request of a response that is kept as lost from now on. Raises RequestError, and then nothing is kept."""
    await call.keep_as_lost()
    job = call.chat.job
    try:
        return gateway.ring.open(job.requests, job.parents)
    except RequestError:
        await call.store.run(call.store.delete, call.id)
        raise


def follow(
    http: HTTPRequest, events: EventLog, start: int | None = None, headers: Mapping[str, str] | None = None
) -> EventStream:
    """The stream of a response from event number `start` on. The response goes on when the client leaves.

    Without `start`, the client is the one that has created the response: it gets all events, kept or not.
    """

    async def chunks() -> AsyncGenerator[bytes, None]:
        left = asyncio.Event()
        watcher = asyncio.create_task(watch(http, events, left))
        try:
            yield b""  # the headers need not wait for the next event
            reading = events.read_as_first(left) if start is None else events.read(start, left)
            async with aclosing(reading) as frames:
                async for part in frames:
                    yield part
        finally:
            watcher.cancel()

    form = StreamFormat(lambda error: error_event(error, start or 0), b"error", end=b"", headers=headers or {})
    return EventStream(chunks(), form)


async def watch(http: HTTPRequest, events: EventLog, left: asyncio.Event) -> None:
    """Stop reading the events when the client closes its connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    left.set()
    events.wake()


def error_event(error: RequestError, start: int) -> bytes:
    """The data of an event that says why a stream cannot go on."""
    event = {"type": "error", "sequence_number": start, "param": error.field, **described(error)}
    return msgspec.json.encode(event)
