"""How a Job is carried out: its requests go round the ring as one group. Every API uses these functions.

run_group        yields the deltas of the requests until each has ended
collect_group    passes every delta to a function, until each request has ended
collect_answers  keeps the one message of each request that holds its answer
stream_group     answers with server-sent events
open_group       the step below: sends requests, and aborts those that still run when the caller is done
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager

from starlette.requests import Request as HTTPRequest

from quartet.http_gateway.generation.intake import Job
from quartet.http_gateway.generation.rank_choice import apply_header
from quartet.http_gateway.http import errors, sse
from quartet.http_gateway.http.call_record import CALL, CallRecord
from quartet.http_gateway.http.sse import Event, EventStream, StreamFormat, frames
from quartet.http_gateway.ring.request_group import RequestDelta, RequestGroup
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.control import Abort
from quartet.runtime.messages import Generate, Text


def no_events() -> Iterable[Event]:
    return ()


async def nothing() -> None:
    pass


async def collect_group(ring: RingClient, http: HTTPRequest, job: Job, take: Callable[[int, Text], None]) -> None:
    """Call `take(index, text)` for each delta, until all requests have ended. Raises what `run_group` raises."""
    async with aclosing(run_group(ring, http, job)) as steps:
        async for deltas in steps:
            for index, text in deltas:
                take(index, text)


async def collect_answers(
    ring: RingClient, http: HTTPRequest, job: Job, is_answer: Callable[[Text], bool]
) -> list[Text | None]:
    """For each request its last message for which `is_answer` is true. Raises what `run_group` raises."""
    answers: list[Text | None] = [None] * len(job.requests)

    def take(index: int, text: Text) -> None:
        if is_answer(text):
            answers[index] = text

    await collect_group(ring, http, job, take)
    return answers


def stream_group(
    ring: RingClient,
    http: HTTPRequest,
    job: Job,
    events_of: Callable[[list[RequestDelta]], Iterable[Event]],
    last_events: Callable[[], Iterable[Event]] = no_events,
    form: StreamFormat = sse.NATIVE,
    at_end: Callable[[], Awaitable[None]] = nothing,
) -> EventStream:
    """The response that streams a job: the events of each step, then `last_events`. An empty step sends nothing.

    `at_end` is awaited before `last_events`.
    """

    async def chunks() -> AsyncGenerator[bytes, None]:
        async with aclosing(run_group(ring, http, job)) as steps:
            async for deltas in steps:
                if chunk := frames(events_of(deltas)):
                    yield chunk
        await at_end()
        if chunk := frames(last_events()):
            yield chunk

    return EventStream(chunks(), form)


async def run_group(ring: RingClient, http: HTTPRequest, job: Job) -> AsyncGenerator[list[RequestDelta], None]:
    """Yield the deltas of the job's requests, by index, until each has ended.

    Raises RequestError for the first request that failed, ClientGone when the client has left. Closing the generator
    (use `aclosing`) aborts what still runs.
    """
    client = None if job.background else http
    apply_header(http.scope.get("headers", ()), job, len(ring.schedulers.all))
    record: CallRecord | None = http.scope.get(CALL)
    if record is not None:
        record.sent(job.requests)
    aborted = await compute_shared_prompts(ring, client, job) if job.warm else []
    async with open_group(ring, job.requests, job.parents, client) as group:
        for rid in aborted:
            ring.abort(Abort(rid=rid))
        while not group.finished:
            deltas = await group.next()
            if record is not None:
                record.heard(deltas)
            raise_failure(deltas, job.names)
            yield deltas


async def compute_shared_prompts(ring: RingClient, client: HTTPRequest | None, job: Job) -> list[str]:
    """Compute the prompts that copies share. The rids of the copies whose prompt was aborted: they are aborted too."""
    parents = [job.parents[first] for first in job.warmed]
    aborted: list[str] = []
    async with open_group(ring, job.warm, parents, client) as group:
        while not group.finished:
            deltas = await group.next()
            raise_failure(deltas, job.names)
            for index, text in deltas:
                if text.tokens.finish is not None and text.tokens.finish.reason == "abort":
                    first = job.warmed[index]
                    copies = job.requests[first : first + job.requests[first].request.params.n]
                    aborted += [copy.request.rid for copy in copies]
    return aborted


def raise_failure(deltas: Iterable[RequestDelta], names: Mapping[str, str]) -> None:
    """Raise RequestError for the first delta that ends its request with an error. `names`: see Job."""
    for _, text in deltas:
        finish = text.tokens.finish
        if finish is not None and finish.reason == "error":
            raise errors.renamed(errors.error_of_finish(finish), names)


@asynccontextmanager
async def open_group(
    ring: RingClient,
    requests: list[Generate],
    parents: Sequence[str] | None = None,
    client: HTTPRequest | None = None,
    *,
    limited: bool = True,
) -> AsyncIterator[RequestGroup]:
    """Send requests as one group. Leaving the block aborts those that still run; see `RingClient.open`.

    `client`: its connection is watched, and `RequestGroup.next` raises ClientGone once it is closed.
    """
    with ring.open(requests, parents, limited=limited) as group:
        watcher = None if client is None else asyncio.create_task(watch_connection(client, group))
        try:
            yield group
        finally:
            if watcher is not None:
                watcher.cancel()


async def watch_connection(client: HTTPRequest, group: RequestGroup) -> None:
    """Tell the group when the client closes its connection."""
    while (await client.receive())["type"] != "http.disconnect":
        pass
    group.client_left()
