"""Request groups: all deltas are passed on, and whatever ends the call early aborts what still runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from quartet.http_gateway.generation.intake import Job
from quartet.http_gateway.generation.run_group import collect_answers, collect_group, open_group, stream_group
from quartet.http_gateway.http.metrics import Metrics
from quartet.http_gateway.http.sse import DONE, Event
from quartet.http_gateway.ring.request_group import ClientGone, RequestDelta
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.control import Abort
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Finish, Generate, Request
from quartet.runtime.sampling import SamplingParams
from tests.unit.http_gateway.harness import FakeRing, asynchronous, never_again, step

STOP = Finish(reason="stop", matched=2)


class Connection:
    """The side of an HTTP request that is watched: it says when the client has gone."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.scope: dict[str, Any] = {}

    async def receive(self) -> Any:
        await self.closed.wait()
        return {"type": "http.disconnect"}


@asynccontextmanager
async def ring_of(transport: FakeRing) -> AsyncIterator[RingClient]:
    client = RingClient(transport, transport, 100, Metrics("m", never_again))
    listening = asyncio.create_task(client.listen())
    try:
        yield client
    finally:
        listening.cancel()


def job(*rids: str, background: bool = False) -> Job:
    requests = [Generate(request=Request(rid=rid, params=SamplingParams()), text="hi") for rid in rids]
    return Job(requests, parents=[""] * len(rids), background=background)


def aborted(transport: FakeRing) -> list[str]:
    return [message.rid for message in transport.sent if isinstance(message, Abort)]


@asynchronous
async def test_collecting_takes_every_delta_until_all_requests_have_ended() -> None:
    transport = FakeRing()
    taken: list[tuple[int, str]] = []
    async with ring_of(transport) as ring:
        transport.push(step("b", [1], "x"), step("a", [1], "y", finish=STOP), step("b", [2], "z", finish=STOP))
        http: Any = Connection()
        await collect_group(ring, http, job("a", "b"), lambda index, text: taken.append((index, text.text)))
        assert taken == [(1, "x"), (0, "y"), (1, "z")] and not ring.unfinished
        assert not aborted(transport)


@asynchronous
async def test_the_answers_are_the_last_messages_that_hold_one_in_the_order_of_the_requests() -> None:
    transport = FakeRing()
    async with ring_of(transport) as ring:
        transport.push(step("b", text="first"), step("b", text="last"), step("b", finish=STOP), step("a", finish=STOP))
        http: Any = Connection()
        answers = await collect_answers(ring, http, job("a", "b"), lambda text: bool(text.text))
        assert [answer and answer.text for answer in answers] == [None, "last"]


@asynchronous
async def test_a_request_that_fails_ends_the_call_and_aborts_the_others() -> None:
    transport = FakeRing()
    async with ring_of(transport) as ring:
        transport.push(step("a", finish=Finish(reason="error", status=400, message="no room")))
        http: Any = Connection()
        with pytest.raises(RequestError, match="no room"):
            await collect_group(ring, http, job("a", "b"), lambda index, text: None)
        assert aborted(transport) == ["b"]


@asynchronous
async def test_a_client_that_leaves_aborts_its_requests() -> None:
    transport = FakeRing()
    async with ring_of(transport) as ring:
        http: Any = Connection()
        http.closed.set()
        with pytest.raises(ClientGone):
            await collect_group(ring, http, job("a", "b"), lambda index, text: None)
        assert aborted(transport) == ["a", "b"]


@asynchronous
async def test_a_background_job_goes_on_when_its_client_has_left() -> None:
    transport = FakeRing()
    taken: list[str] = []
    async with ring_of(transport) as ring:
        http: Any = Connection()
        http.closed.set()
        collecting = asyncio.create_task(
            collect_group(ring, http, job("a", background=True), lambda index, text: taken.append(text.text))
        )
        await transport.sent_of(Generate)
        transport.push(step("a", [1], "x", finish=STOP))
        await collecting
        assert taken == ["x"] and not aborted(transport)


@asynchronous
async def test_an_exception_in_the_block_aborts_what_still_runs() -> None:
    transport = FakeRing()
    async with ring_of(transport) as ring:
        with pytest.raises(KeyError):
            async with open_group(ring, job("a", "b").requests) as group:
                transport.push(step("a", finish=STOP))
                await group.next()
                raise KeyError
        assert aborted(transport) == ["b"]


@asynchronous
async def test_a_stream_sends_a_chunk_for_each_step_that_has_events_and_the_last_events_behind_them() -> None:
    transport = FakeRing()
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if message["type"] == "http.response.body" and b"x" in message["body"]:
            transport.push(step("a", [2], ""))
            transport.push(step("a", [3], "y", finish=STOP))

    def events(deltas: list[RequestDelta]) -> list[Event]:
        return [Event(text.text.encode()) for _, text in deltas if text.text]

    async with ring_of(transport) as ring:
        transport.push(step("a", [1], "x"))
        http: Any = Connection()
        response = stream_group(ring, http, job("a"), events, lambda: [Event(b"end", b"last"), Event(b"usage")])
        await response({}, http.receive, send)
    assert sent[1:] == [
        b"data: x\n\n",
        b"data: y\n\n",
        b"event: last\ndata: end\n\ndata: usage\n\n",
        DONE,
    ]


@asynchronous
async def test_a_stream_that_is_cancelled_aborts_its_requests() -> None:
    transport = FakeRing()
    first = asyncio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            first.set()

    def events(deltas: list[RequestDelta]) -> list[Event]:
        return [Event(text.text.encode()) for _, text in deltas]

    async with ring_of(transport) as ring:
        http: Any = Connection()
        response = asyncio.create_task(stream_group(ring, http, job("a"), events)({}, http.receive, send))
        await transport.sent_of(Generate)
        transport.push(step("a", [1], "x"))
        await first.wait()
        response.cancel()
        with pytest.raises(asyncio.CancelledError):
            await response
        assert aborted(transport) == ["a"]
