"""Carrying out a Job: its requests go round the ring, what comes back is yielded. Shared by every API."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from starlette.requests import Request as HTTPRequest

from quartet.http_gateway.generation.intake import Job
from quartet.http_gateway.http import errors
from quartet.http_gateway.ring.flight import Delivery, Flight
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.control import Abort
from quartet.runtime.messages import Generate


async def run(ring: RingClient, http: HTTPRequest, job: Job) -> AsyncGenerator[list[Delivery], None]:
    """Yield what arrives for the job's requests, by index, until each has ended.

    Raises RequestError for the first request that failed, ClientGone when the client has left; closing the generator
    (use `aclosing`) aborts whatever still runs.
    """
    unwanted = await warm_up(ring, http, job) if job.warm else []
    async with aclosing(fly(ring, http, job.requests, job.parents, job.background, unwanted)) as steps:
        async for mail in steps:
            yield mail


async def warm_up(ring: RingClient, http: HTTPRequest, job: Job) -> list[str]:
    """Run what goes before the copies. The rids of the copies whose own was aborted: an abort of it means them."""
    parents = [job.parents[first] for first in job.warmed]
    unwanted: list[str] = []
    async with aclosing(fly(ring, http, job.warm, parents, job.background)) as steps:
        async for mail in steps:
            for index, text in mail:
                if text.tokens.finish is not None and text.tokens.finish.reason == "abort":
                    first = job.warmed[index]
                    copies = job.requests[first : first + job.requests[first].request.params.n]
                    unwanted += [copy.request.rid for copy in copies]
    return unwanted


async def fly(
    ring: RingClient,
    http: HTTPRequest,
    batch: list[Generate],
    parents: list[str],
    background: bool,
    unwanted: Sequence[str] = (),
) -> AsyncGenerator[list[Delivery], None]:
    """Send the batch, abort at once what is `unwanted` of it, and yield what comes back."""
    with ring.open(batch, parents) as flight:
        for rid in unwanted:
            ring.abort(Abort(rid=rid))
        async with watched(http, None if background else flight):
            while not flight.finished:
                mail = await flight.next()
                for _, text in mail:
                    finish = text.tokens.finish
                    if finish is not None and finish.reason == "error":
                        raise errors.of_finish(finish)
                yield mail


@asynccontextmanager
async def watched(http: HTTPRequest, flight: Flight | None) -> AsyncIterator[None]:
    """Tell the flight when the client closes its connection; nothing to watch where there is no flight."""
    if flight is None:
        yield
        return

    async def watch(flight: Flight) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        flight.leave()

    watcher = asyncio.create_task(watch(flight))
    try:
        yield
    finally:
        watcher.cancel()
