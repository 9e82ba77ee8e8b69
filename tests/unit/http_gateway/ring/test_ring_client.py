"""The ring client: deliveries, the journal, aborts, limits, commands."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from quartet.http_gateway.http.metrics import Metrics
from quartet.http_gateway.ring.request_group import ClientGone
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.control import Abort, FlushCache, Tokenize
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Finish, Generate, Reply, Request
from quartet.runtime.sampling import SamplingParams
from tests.unit.http_gateway.harness import FakeRing, asynchronous, never_again, step

STOP = Finish(reason="stop", matched=2)


def asked(rid: str) -> Generate:
    return Generate(request=Request(rid=rid, params=SamplingParams()), text="hi")


@asynccontextmanager
async def connected(limit: int = 10) -> AsyncIterator[tuple[RingClient, FakeRing]]:
    transport = FakeRing()
    ring = RingClient(transport, transport, limit, Metrics("m", never_again))
    listening = asyncio.create_task(ring.listen())
    yield ring, transport
    listening.cancel()


@asynchronous
async def test_everything_that_waits_is_taken_at_once_and_in_order() -> None:
    async with connected() as (ring, transport):
        with ring.open([asked("a"), asked("b")]) as group:
            transport.push(step("b", [1], "x"), step("a", [2], "y"), step("b", [3], "z", finish=STOP))
            deltas = await group.next()
            assert [(index, text.text) for index, text in deltas] == [(1, "x"), (0, "y"), (1, "z")]
            assert not group.finished
            transport.push(step("a", finish=STOP))
            await group.next()
            assert group.finished
        assert ring.unfinished == 0
        assert not [message for message in transport.sent if isinstance(message, Abort)]


@asynchronous
async def test_steps_that_nobody_takes_pile_up_to_a_bound_and_end_their_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quartet.http_gateway.ring.request_group.MAX_UNREAD_STEPS", 100)
    async with connected() as (ring, transport):
        with ring.open([asked("a"), asked("b")]) as group, ring.open([asked("c")]) as other:
            for _ in range(201):
                transport.push(step("a", [1], "x"))
            aborts = await transport.sent_of(Abort, 2)
            assert [abort.rid for abort in aborts] == ["a", "b"]
            transport.push(step("b", [1], "x"), step("c", [1], "x", finish=STOP))
            assert len(await other.next()) == 1
            assert not group._deltas
            with pytest.raises(ClientGone):
                await group.next()


@asynchronous
async def test_leaving_a_group_aborts_only_what_still_runs() -> None:
    async with connected() as (ring, transport):
        with ring.open([asked("a"), asked("b")]) as group:
            transport.push(step("a", finish=STOP))
            await group.next()
        assert [abort.rid for abort in await transport.sent_of(Abort)] == ["b"]


@asynchronous
async def test_a_rid_stays_taken_until_its_terminal_message_has_passed() -> None:
    async with connected() as (ring, transport):
        with ring.open([asked("a")]):
            pass
        with pytest.raises(RequestError, match="Duplicate request ID detected: a"):
            ring.open([asked("a")])
        transport.push(step("a", finish=Finish(reason="abort")))
        await ring.idle()
        with ring.open([asked("a")]):
            assert ring.unfinished == 1


@asynchronous
async def test_a_client_that_leaves_wakes_its_group() -> None:
    async with connected() as (ring, _):
        with ring.open([asked("a")]) as group:
            waiting = asyncio.create_task(group.next())
            await asyncio.sleep(0)
            group.client_left()
            with pytest.raises(ClientGone):
                await waiting


@asynchronous
async def test_too_many_requests_in_flight_are_refused_for_now() -> None:
    async with connected(limit=2) as (ring, _):
        with ring.open([asked("a"), asked("b")]), pytest.raises(RequestError) as refused:
            ring.open([asked("c")])
        assert refused.value.kind is Kind.UNAVAILABLE


@asynchronous
async def test_a_call_of_more_requests_than_fit_is_the_callers_fault() -> None:
    async with connected(limit=2) as (ring, _):
        with pytest.raises(RequestError) as refused:
            ring.open([asked("a"), asked("b"), asked("c")])
        assert refused.value.kind is Kind.BAD_REQUEST


@asynchronous
async def test_abort_means_the_rid_itself_and_the_requests_made_from_it() -> None:
    async with connected() as (ring, transport):
        with ring.open([asked("a"), asked("ab"), asked("x1"), asked("x2")], ["", "", "x", "x"]):
            assert ring.abort(Abort(rid="a")) == 1
            assert ring.abort(Abort(rid="x")) == 2
            assert ring.abort(Abort(rid="a", prefix=True)) == 2
            assert ring.abort(Abort(rid="nobody")) == 0
            assert ring.abort(Abort()) == 0
            assert ring.abort(Abort(abort_all=True)) == 4
            rids = [abort.rid for abort in await transport.sent_of(Abort)]
            assert rids == ["a", "x1", "x2", "a", "ab", "a", "ab", "x1", "x2"]


@asynchronous
async def test_an_abort_of_the_detokenizer_goes_on_to_the_scheduler() -> None:
    async with connected() as (_, transport):
        transport.push(Abort(rid="a"))
        assert [abort.rid for abort in await transport.sent_of(Abort)] == ["a"]


@asynchronous
async def test_a_command_gets_its_own_reply() -> None:
    async with connected() as (ring, transport):
        transport.answers_commands = False
        first = asyncio.create_task(ring.command(FlushCache(), 5))
        second = asyncio.create_task(ring.command(FlushCache(), 5))
        one, two = await transport.sent_of(FlushCache, 2)
        transport.push(Reply(id=two.id, message="two"), Reply(id="999"), Reply(id=one.id, message="one"))
        answers = [await first, await second]
        assert [answer.message for answer in answers if isinstance(answer, Reply)] == ["one", "two"]
        assert ring.stale == 1


@asynchronous
async def test_a_command_that_no_hop_takes_is_refused() -> None:
    async with connected() as (ring, _):
        reply = await ring.command(Tokenize(texts=["x"]), 5)
        assert isinstance(reply, Reply)
        assert (reply.success, reply.status, reply.message) == (False, 400, "tokenize is not supported.")


@asynchronous
async def test_a_command_without_an_answer_times_out_and_leaves_nothing() -> None:
    async with connected() as (ring, transport):
        transport.answers_commands = False
        with pytest.raises(TimeoutError):
            await ring.command(FlushCache(), 0.001)
        assert not ring._commands._unanswered


@asynchronous
async def test_end_all_finishes_requests_without_the_ring() -> None:
    async with connected() as (ring, _):
        with ring.open([asked("a")]) as group:
            ring.end_all("over")
            [(_, text)] = await group.next()
            assert text.tokens.finish == Finish(reason="abort", message="over")
            assert group.finished


@asynchronous
async def test_numbers_beyond_64_bits_are_the_callers_fault() -> None:
    class Full(FakeRing):
        def send(self, messages: object) -> bool:
            raise OverflowError("can't serialize ints >= 2**64")

    ring = RingClient(FakeRing(), Full(), 10, Metrics("m", never_again))
    with pytest.raises(RequestError, match="out of range"):
        ring.open([asked("a")])


@asynchronous
async def test_endpoints_get_their_turn_while_frames_keep_coming() -> None:
    async with connected() as (ring, transport):
        with ring.open([asked("a")]) as group:
            for token in range(100):
                transport.push(step("a", [token]))
            assert len(await group.next()) < 100
