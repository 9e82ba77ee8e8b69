"""What the gateway sends again after a restart of a ring process, what it drops, and how it finds a culprit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from quartet.http_gateway.http.metrics import Metrics
from quartet.http_gateway.ring.admission import BLOCKED_REQUEST
from quartet.http_gateway.ring.first_lap import wait_until_connected
from quartet.http_gateway.ring.quarantine import POISON_REQUEST, PROOF_TOKENS
from quartet.http_gateway.ring.request_group import RequestGroup
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.control import (
    COMMAND_LOST,
    Abort,
    ControlCommand,
    FlushCache,
    PauseGeneration,
    Tokenize,
    UpdateWeightVersion,
)
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Facts, Finish, Generate, Reply, Request, Restarted, pack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.sockets import FrameTooLarge
from tests.unit.http_gateway.harness import FakeRing, asynchronous, never_again, served, step

STOP = Finish(reason="stop", matched=2)


def facts(epoch: int = 0, **state: object) -> Facts:
    return Facts(
        epoch=epoch, max_total_num_tokens=1, max_req_input_len=1, context_length=1, vocab_size=10, state=dict(state)
    )


def asked(rid: str) -> Generate:
    return Generate(request=Request(rid=rid, params=SamplingParams()), text=f"prompt of {rid}")


class Ring:
    """A ring client that has met its first scheduler, and the transport behind it."""

    def __init__(self) -> None:
        self.transport = FakeRing()
        self.metrics = Metrics("m", never_again)
        self.client = RingClient(self.transport, self.transport, 100, self.metrics)
        self.epoch = 0

    async def settle(self) -> None:
        """Let the listener take in all that was pushed."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def restart(self, role: str) -> None:
        """A service starts again; what was sent before is forgotten here."""
        self.transport.sent.clear()
        if role == "scheduler":
            self.epoch += 1
            self.transport.push(facts(self.epoch))
        else:
            self.transport.push(Restarted(role=role))
        await self.settle()

    @property
    def order(self) -> list[str]:
        """Of the requests and commands sent since the last restart."""
        named = {Generate: lambda m: m.request.rid, PauseGeneration: lambda m: "pause", FlushCache: lambda m: "flush"}
        return [named[type(message)](message) for message in self.transport.sent if type(message) in named]

    @property
    def sent(self) -> list[tuple[str, int, bytes]]:
        """rid, attempt and resumed ids of the requests sent since the last restart."""
        found = [message.request for message in self.transport.sent if isinstance(message, Generate)]
        return [(request.rid, request.attempt, request.resume_ids) for request in found]

    @property
    def rids(self) -> list[str]:
        return [rid for rid, _, _ in self.sent]

    @property
    def aborts(self) -> list[str]:
        return [message.rid for message in self.transport.sent if isinstance(message, Abort)]

    def open(self, *rids: str) -> RequestGroup:
        return self.client.open([asked(rid) for rid in rids])


@asynccontextmanager
async def connected() -> AsyncIterator[Ring]:
    ring = Ring()
    listening = asyncio.create_task(ring.client.listen())
    ring.transport.push(facts())
    await ring.settle()
    yield ring
    listening.cancel()


@asynchronous
async def test_after_a_scheduler_requests_go_on_behind_what_was_delivered_and_old_attempts_are_dropped() -> None:
    async with connected() as ring:
        with ring.open("a", "b") as group:
            ring.transport.push(step("a", [5, 6], "xy"))
            await group.next()
            await ring.restart("scheduler")
            assert ring.sent == [("a", 1, pack_ids([5, 6])), ("b", 1, b"")]
            ring.transport.push(step("a", [7], "stale"), step("a", [7], "z", attempt=1, finish=STOP))
            assert [text.text for _, text in await group.next()] == ["z"]
            assert ring.client.stale == 1


@asynchronous
async def test_facts_of_the_same_scheduler_are_no_restart() -> None:
    async with connected() as ring:
        with ring.open("a"):
            ring.transport.sent.clear()
            ring.transport.push(facts())
            await ring.settle()
            assert ring.sent == []


@asynchronous
async def test_the_facts_of_a_dead_scheduler_behind_its_successors_are_no_restart() -> None:
    async with connected() as ring:
        with ring.open("a"):
            ring.epoch = 1
            await ring.restart("scheduler")
            ring.transport.sent.clear()
            ring.transport.push(facts(1), facts(2))
            await ring.settle()
            assert ring.sent == []


@asynchronous
async def test_requests_and_commands_name_the_scheduler_that_they_are_sent_to() -> None:
    async with connected() as ring:
        ring.transport.answers_commands = False
        await ring.restart("scheduler")
        tasks = [asyncio.create_task(ring.client.command(c, 5)) for c in (FlushCache(), Tokenize())]
        with ring.open("a"):
            await ring.settle()
            [generate] = [message for message in ring.transport.sent if isinstance(message, Generate)]
            [flush, tokenize] = [message for message in ring.transport.sent if isinstance(message, ControlCommand)]
            assert (generate.request.epoch, flush.epoch, tokenize.epoch) == (1, 1, None)
        for task in tasks:
            task.cancel()


@asynchronous
async def test_after_a_tokenizer_only_requests_that_nothing_was_heard_of_are_sent_again() -> None:
    async with connected() as ring:
        with ring.open("heard", "unheard") as group:
            ring.transport.push(step("heard", [5], "x"))
            await group.next()
            await ring.restart("tokenizer")
            assert ring.sent == [("unheard", 1, b"")]
            ring.transport.push(step("heard", [6], "y", finish=STOP))  # from its first attempt, which goes on
            assert [text.text for _, text in await group.next()] == ["y"]


@asynchronous
async def test_a_request_sent_again_may_be_lost_with_the_tokenizer_though_it_was_heard_of_before() -> None:
    async with connected() as ring:
        with ring.open("a") as group:
            ring.transport.push(step("a", [5], "x"))
            await group.next()
            await ring.restart("scheduler")
            await ring.restart("tokenizer")
            assert ring.sent == [("a", 2, pack_ids([5]))]
            (again,) = [message for message in ring.transport.sent if isinstance(message, Generate)]
            assert again.request.again


@asynchronous
async def test_after_a_detokenizer_all_requests_are_sent_again() -> None:
    async with connected() as ring:
        with ring.open("heard", "unheard") as group:
            ring.transport.push(step("heard", [5], "x"))
            await group.next()
            await ring.restart("detokenizer")
            assert ring.sent == [("heard", 1, pack_ids([5])), ("unheard", 1, b"")]


@asynchronous
async def test_a_rid_used_again_after_a_restart_is_not_mixed_up_with_what_is_left_of_the_first() -> None:
    async with connected() as ring:
        with ring.open("a"):
            pass
        await ring.restart("tokenizer")
        with ring.open("a") as group:
            ring.transport.push(step("a", [5], "left over", finish=Finish(reason="abort")))
            ring.transport.push(step("a", [6], "new", attempt=1))
            assert [text.text for _, text in await group.next()] == ["new"]


@asynchronous
async def test_requests_that_nobody_wants_any_more_end_here_and_in_the_scheduler() -> None:
    async with connected() as ring:
        with ring.open("gone"):
            pass
        with ring.open("aborted") as group:
            ring.client.abort(Abort(rid="aborted", abort_message="enough"))
            await ring.restart("tokenizer")
            assert ring.aborts == ["gone", "aborted"]
            assert ring.sent == []
            [(_, text)] = await group.next()
            assert text.tokens.finish == Finish(reason="abort", message="enough")
        await ring.client.idle()


@asynchronous
async def test_a_new_scheduler_is_not_asked_to_end_what_it_never_knew() -> None:
    async with connected() as ring:
        with ring.open("gone"):
            pass
        await ring.restart("scheduler")
        assert (ring.aborts, ring.sent) == ([], [])
        await ring.client.idle()


@asynchronous
async def test_an_abort_of_the_detokenizer_that_may_be_lost_with_the_tokenizer_is_sent_again() -> None:
    async with connected() as ring:
        ring.transport.push(Abort(rid="stopped"))
        await ring.settle()
        await ring.restart("tokenizer")
        assert ring.aborts == ["stopped"]
        await ring.restart("scheduler")
        await ring.restart("tokenizer")
        assert ring.aborts == []  # there is nothing that it could end


@asynchronous
async def test_a_relayed_abort_is_sent_again_where_its_request_waits_for_the_last_message() -> None:
    async with connected() as ring:
        with ring.open("stopped") as group:
            ring.transport.push(step("stopped", [5], "x"))
            await group.next()
            ring.transport.push(Abort(rid="stopped", exact=True))
            await ring.settle()
            await ring.restart("tokenizer")
            assert ring.aborts == ["stopped"]


@asynchronous
async def test_a_relayed_abort_does_not_end_a_request_that_took_the_rid_later() -> None:
    async with connected() as ring:
        ring.transport.push(Abort(rid="a", exact=True))
        await ring.settle()
        with ring.open("a") as group:
            ring.transport.push(step("a", [5], "x"))
            await group.next()
            await ring.restart("tokenizer")
            assert ring.aborts == []


@asynchronous
async def test_the_number_of_cached_tokens_stays_that_of_the_first_attempt() -> None:
    async with connected() as ring:
        with ring.open("a") as group:
            ring.transport.push(step("a", [5], "x", prompt_tokens=9, cached_tokens=0))
            await group.next()
            await ring.restart("scheduler")
            ring.transport.push(step("a", [6], "y", attempt=1, prompt_tokens=9, cached_tokens=8, finish=STOP))
            [(_, text)] = await group.next()
            assert text.tokens.cached_tokens == 0


@asynchronous
async def test_a_request_that_has_become_too_large_ends_alone() -> None:
    class Narrow(FakeRing):
        def send(self, messages: object) -> None:
            assert isinstance(messages, list)
            if any(isinstance(message, Generate) and message.request.resume_ids for message in messages):
                raise FrameTooLarge("frame of 99 bytes, at most 9 are sent")
            super().send(messages)

    async with connected() as ring:
        narrow = Narrow()
        ring.client._outbox = narrow
        with ring.open("large", "small") as group:
            ring.transport.push(step("large", [5], "x"))
            await group.next()
            await ring.restart("scheduler")
            [(index, text)] = await group.next()
            assert index == 0 and text.tokens.finish is not None and text.tokens.finish.status == 413
            assert [m.request.rid for m in narrow.sent if isinstance(m, Generate)] == ["large", "small", "small"]


# commands


@asynchronous
async def test_a_command_under_way_fails_with_its_scheduler() -> None:
    async with connected() as ring:
        ring.transport.answers_commands = False
        waiting = asyncio.create_task(ring.client.command(FlushCache(), 5))
        await ring.settle()
        await ring.restart("scheduler")
        with pytest.raises(RequestError, match="started again") as refused:
            await waiting
        assert (refused.value.message, refused.value.kind) == (COMMAND_LOST, Kind.UNAVAILABLE)


@asynchronous
@pytest.mark.parametrize("role", ["tokenizer", "detokenizer"])
async def test_a_command_that_may_be_lost_elsewhere_is_sent_again_under_its_id(role: str) -> None:
    async with connected() as ring:
        ring.transport.answers_commands = False
        waiting = asyncio.create_task(ring.client.command(FlushCache(), 5))
        (first,) = await ring.transport.sent_of(FlushCache)
        await ring.restart(role)
        (again,) = await ring.transport.sent_of(FlushCache)
        assert again.id == first.id
        ring.transport.push(Reply(id=first.id, message="done"), Reply(id=first.id, message="done"))
        answer = await waiting
        assert isinstance(answer, Reply) and answer.message == "done"


@asynchronous
async def test_a_command_that_changes_nothing_is_simply_asked_again() -> None:
    async with connected() as ring:
        ring.transport.answers_commands = False
        waiting = asyncio.create_task(ring.client.command(Tokenize(texts=["x"]), 5))
        await ring.settle()
        await ring.restart("scheduler")
        (again,) = await ring.transport.sent_of(Tokenize)
        ring.transport.push(Reply(id=again.id, body={"tokens": [[1]]}))
        answer = await waiting
        assert isinstance(answer, Reply) and answer.body == {"tokens": [[1]]}


@asynchronous
async def test_requests_and_commands_are_sent_again_in_their_order() -> None:
    async with connected() as ring:
        ring.transport.answers_commands = False
        with ring.open("before"):
            waiting = asyncio.create_task(ring.client.command(PauseGeneration(mode="in_place"), 5))
            await ring.settle()
            with ring.open("after"):
                await ring.restart("tokenizer")
                assert ring.order == ["before", "pause", "after"]
                waiting.cancel()


@asynchronous
@pytest.mark.parametrize("command", [PauseGeneration(mode="abort"), UpdateWeightVersion(new_version="2")])
async def test_what_a_command_has_ended_stays_ended_though_the_last_word_is_lost(command: ControlCommand) -> None:
    async with connected() as ring:
        ring.transport.answers_commands = False
        with ring.open("before") as before:
            waiting = asyncio.create_task(ring.client.command(command, 5))
            await ring.settle()
            with ring.open("after"):
                await ring.restart("detokenizer")
                ring.transport.push(Reply(id=command.id))
                await waiting
                assert ring.aborts == ["before"]
                ring.transport.push(step("before", attempt=1, finish=Finish(reason="abort", message="Aborted")))
                [(_, text)] = await before.next()
                assert text.tokens.finish is not None and text.tokens.finish.reason == "abort"


@asynchronous
async def test_a_lap_goes_on_through_a_restart() -> None:
    async with connected() as ring:
        ring.transport.answers_commands = False
        lap = asyncio.create_task(wait_until_connected(ring.client.probe))
        await ring.settle()
        ring.transport.answers_commands = True
        await ring.restart("scheduler")
        await lap


@asynchronous
async def test_the_gateway_learns_what_a_new_scheduler_serves() -> None:
    async with served() as server:
        gateway = server.gateway
        server.ring.push(facts(), facts(1, weight_version="v7", paused=True, asleep=False))
        while gateway.weight_version != "v7":
            await asyncio.sleep(0)
        assert gateway.paused


@asynchronous
async def test_the_gateway_learns_from_the_facts_of_the_same_scheduler_too() -> None:
    async with served() as server:
        server.ring.push(facts(0, weight_version="v7", paused=True))
        while server.gateway.weight_version != "v7":
            await asyncio.sleep(0)
        assert server.gateway.paused


@asynchronous
async def test_a_new_gateway_says_so_until_the_scheduler_speaks() -> None:
    transport = FakeRing()
    client = RingClient(transport, transport, 10, Metrics("m", never_again))
    listening = asyncio.create_task(client.listen())
    introduction = asyncio.create_task(client.introduce())
    assert await transport.sent_of(Restarted) == [Restarted(role="gateway")]
    transport.push(facts(3, paused=True))
    await introduction
    assert (await client.schedulers.facts()).state == {"paused": True}
    assert PauseGeneration not in map(type, transport.sent)
    listening.cancel()


@asynchronous
async def test_a_new_gateway_begins_beyond_the_attempts_of_the_one_before() -> None:
    transport = FakeRing()
    client = RingClient(transport, transport, 10, Metrics("m", never_again), least_attempt=1 << 20)
    introduction = asyncio.create_task(client.introduce())
    assert await transport.sent_of(Restarted) == [Restarted(role="gateway", least_attempt=1 << 20)]
    with client.open([asked("a")]):
        (sent,) = await transport.sent_of(Generate)
        assert (sent.request.attempt, sent.request.again) == (1 << 20, False)
    introduction.cancel()


@asynchronous
async def test_after_a_text_service_the_scheduler_is_asked_for_its_facts_for_they_may_be_lost() -> None:
    async with connected() as ring:
        await ring.restart("detokenizer")
        assert [message.role for message in ring.transport.sent if isinstance(message, Restarted)] == ["gateway"]


@asynchronous
async def test_the_scheduler_is_asked_for_its_facts_before_anything_is_sent_again() -> None:
    async with connected() as ring:
        with ring.open("a"):
            await ring.restart("detokenizer")
            assert [type(message) for message in ring.transport.sent] == [Restarted, Generate]


# the culprit


@asynchronous
async def test_who_was_there_at_two_deaths_without_progress_runs_alone_and_fails_alone() -> None:
    async with connected() as ring:
        with ring.open("bad") as bad, ring.open("good") as good:
            await ring.restart("scheduler")
            assert ring.rids == ["bad", "good"]
            ring.transport.push(step("good", range(PROOF_TOKENS), "progress", attempt=1))
            await good.next()
            await ring.restart("scheduler")
            assert ring.rids == ["bad"]
            with ring.open("new"):
                assert ring.rids == ["bad"]  # which waits as well
                await ring.restart("scheduler")
                [(_, text)] = await bad.next()
                finish = text.tokens.finish
                assert finish is not None and (finish.reason, finish.status) == ("error", 500)
                assert finish.message == POISON_REQUEST.format(role="scheduler")
                assert ring.sent == [("good", 3, pack_ids(range(PROOF_TOKENS))), ("new", 3, b"")]


@asynchronous
async def test_suspects_run_in_groups_and_one_by_one_when_a_group_has_died() -> None:
    async with connected() as ring:
        names = "abcdefg"  # three groups
        with ring.open(*names) as group:
            for _ in range(2):
                await ring.restart("scheduler")
            assert ring.rids == ["a", "b", "c"]
            ring.transport.push(*(step(name, range(PROOF_TOKENS), "", attempt=2) for name in "abc"))
            await group.next()
            assert ring.rids == [*"abc", *"def"]
            assert ring.aborts == ["a", "b", "c"]  # they wait again
            await ring.restart("scheduler")
            assert ring.rids == ["d"]
            attempt = ring.sent[0][1]
            ring.transport.push(step("d", [2], "", attempt=attempt, finish=STOP))
            await group.next()
            assert ring.rids == ["d", "e"]
            await ring.restart("scheduler")
            [(index, text)] = await group.next()
            assert names[index] == "e"
            assert text.tokens.finish is not None and text.tokens.finish.reason == "error"
            assert ring.rids == ["f"]


@asynchronous
async def test_who_has_never_made_anything_is_suspected_first() -> None:
    async with connected() as ring:
        with ring.open("old") as old, ring.open("new"):
            ring.transport.push(step("old", [5], "x"))
            await old.next()
            for _ in range(2):
                await ring.restart("scheduler")
            assert ring.rids == ["new"]


@asynchronous
async def test_a_request_equal_to_a_poison_request_fails_with_it_and_is_blocked() -> None:
    async with connected() as ring:
        alike = [
            Generate(request=Request(rid=rid, params=SamplingParams(), seed=i), text="bad")
            for i, rid in enumerate("ab")
        ]
        with ring.client.open(alike) as group:
            for _ in range(4):
                await ring.restart("scheduler")
            ended = await group.next()
            assert [text.tokens.finish.status for _, text in ended if text.tokens.finish] == [500, 500]
        retry = Generate(request=Request(rid="c", params=SamplingParams(), seed=9), text="bad")
        with pytest.raises(RequestError, match="not tried for ten minutes") as refused:
            ring.client.open([retry])
        assert (refused.value.message, refused.value.kind) == (BLOCKED_REQUEST, Kind.INTERNAL)
        with ring.open("other"):
            assert ring.rids == ["other"]


@asynchronous
async def test_a_suspect_whose_client_leaves_lets_the_others_go_on() -> None:
    async with connected() as ring:
        with ring.open("others"):
            with ring.open("suspect"):
                ring.transport.push(step("others", range(PROOF_TOKENS), "x"))
                await ring.settle()
                await ring.restart("scheduler")
                ring.transport.push(step("others", range(PROOF_TOKENS), "x", attempt=1))
                await ring.settle()
                await ring.restart("scheduler")
                assert ring.rids == ["suspect"]
            ring.transport.push(step("suspect", attempt=2, finish=Finish(reason="abort")))
            await ring.settle()
            assert ring.rids == ["suspect", "others"]


@asynchronous
async def test_a_request_held_back_can_be_aborted() -> None:
    async with connected() as ring:
        with ring.open("a"), ring.open("held") as held:
            await ring.restart("scheduler")
            await ring.restart("scheduler")
            assert ring.rids == ["a"]
            assert ring.client.abort(Abort(rid="held")) == 1
            [(_, text)] = await held.next()
            assert text.tokens.finish is not None and text.tokens.finish.reason == "abort"
            assert ring.aborts == []


@asynchronous
async def test_what_ends_the_tokenizer_is_found_while_streams_go_on() -> None:
    async with connected() as ring:
        with ring.open("bad") as bad, ring.open("stream") as stream:
            ring.transport.push(step("stream", [5], "x"))
            await stream.next()
            for _ in range(3):
                await ring.restart("tokenizer")
            [(_, text)] = await bad.next()
            assert text.tokens.finish is not None
            assert text.tokens.finish.message == POISON_REQUEST.format(role="tokenizer")
            ring.transport.push(step("stream", [6], "y", finish=STOP))
            assert [text.text for _, text in await stream.next()] == ["y"]


@asynchronous
async def test_a_suspect_that_nobody_wants_any_more_ends_and_is_not_sent_again() -> None:
    async with connected() as ring:
        with ring.open("other"):
            with ring.open("suspect"):
                await ring.restart("scheduler")
                ring.transport.push(step("other", range(PROOF_TOKENS), "x", attempt=1))
                await ring.settle()
                await ring.restart("scheduler")
            await ring.restart("scheduler")
            assert ring.rids == ["other"]
            assert ring.aborts == []


@asynchronous
async def test_a_suspect_that_nobody_wants_any_more_ends_though_it_proves_itself_meanwhile() -> None:
    async with connected() as ring:
        with ring.open("next"):
            with ring.open("left"):
                ring.transport.push(step("next", [5], "x"))
                await ring.settle()
                await ring.restart("scheduler")
                await ring.restart("scheduler")
                assert ring.rids == ["left"]
            proof = step("left", range(PROOF_TOKENS), "x", attempt=2)
            ring.transport.push(proof, step("left", attempt=2, finish=Finish(reason="abort")))
            await ring.settle()
            assert ring.rids == ["left", "next"]
            assert ring.client.unfinished == 1


@asynchronous
async def test_a_suspect_of_one_service_that_ends_another_is_found() -> None:
    async with connected() as ring:
        with ring.open("bad", "good") as group:
            for role in ["scheduler", "scheduler", *["detokenizer"] * 3]:
                await ring.restart(role)
            [(index, text)] = await group.next()
            assert index == 0 and text.tokens.finish is not None
            assert text.tokens.finish.message == POISON_REQUEST.format(role="detokenizer")
            assert ring.rids == ["good"]


@asynchronous
async def test_a_suspect_runs_when_a_probe_has_come_round_behind_the_end_of_all_others() -> None:
    async with connected() as ring:
        ring.transport.answers_commands = False
        with ring.open("suspect", "other"):
            for _ in range(3):  # the last of them before the ring is clear, so that nobody is to blame
                await ring.restart("detokenizer")
            *aborts, probe = [message for message in ring.transport.sent if isinstance(message, ControlCommand)]
            assert [abort.rid for abort in aborts if isinstance(abort, Abort)] == ["suspect", "other"]
            assert ring.rids == []
            ring.transport.push(probe)
            await ring.settle()
            assert ring.rids == ["suspect"]
            assert ring.client.unfinished == 2
