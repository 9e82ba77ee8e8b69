"""The ring client with several schedulers: deaths, commands for all, and changes that all make or none."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quartet.http_gateway.http.metrics import Metrics
from quartet.http_gateway.ring import levelling
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.adapters import LoadAdapter, UnloadAdapter
from quartet.runtime.control import (
    Abort,
    DecideChange,
    FlushCache,
    PauseGeneration,
    Probe,
    ReleaseMemory,
    ResumeMemory,
    UpdateWeightsFromDisk,
    UpdateWeightVersion,
)
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.guard import Announced
from quartet.runtime.messages import Finish, Generate, Prepared, Reply, Request, Restarted, pack_ids
from quartet.runtime.sampling import SamplingParams
from tests.unit.http_gateway.harness import FakeRing, asynchronous, never_again, step
from tests.unit.http_gateway.ring.test_schedulers import ADAPTER, facts

STOP = Finish(reason="stop", matched=2)
PIDS = (100, 200)


class Fleet:
    """A ring client, two schedulers that live, and their ends."""

    def __init__(self, run_dir: str) -> None:
        self.transport = FakeRing()
        self.transport.answers_commands = False
        self.ends: dict[int, Callable[[], None]] = {}
        self.client = RingClient(
            self.transport,
            self.transport,
            10,
            Metrics("m", never_again),
            announced=Announced(schedulers=2),
            schedulers=2,
            run_dir=run_dir,
            watch=self.ends.__setitem__,
        )

    def start(self, rank: int, epoch: int = 0, **served: Any) -> None:
        said = facts(rank, epoch, **served)
        said.pid = PIDS[rank] + epoch
        self.transport.push(said)

    async def end(self, rank: int, epoch: int = 0) -> None:
        self.transport.sent.clear()
        self.ends[PIDS[rank] + epoch]()
        await settle()

    async def say(self, *messages: Any) -> None:
        self.transport.push(*messages)
        await settle()

    @property
    def generates(self) -> list[tuple[str, int, int, int, bytes]]:
        """rid, rank, epoch, attempt and resumed ids of the requests that were sent."""
        found = [message.request for message in self.transport.sent if isinstance(message, Generate)]
        return [(one.rid, one.rank, one.epoch, one.attempt, one.resume_ids) for one in found]

    def sent(self, kind: type) -> list[Any]:
        return [message for message in self.transport.sent if isinstance(message, kind)]


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


@asynccontextmanager
async def fleet(run_dir: str = "") -> AsyncIterator[Fleet]:
    found = Fleet(run_dir)
    listening = asyncio.create_task(found.client.listen())
    found.start(0)
    found.start(1)
    await settle()
    yield found
    listening.cancel()


def asked(rid: str, rank: int | None = None, adapter: str = "") -> Generate:
    return Generate(request=Request(rid=rid, params=SamplingParams(), wanted_rank=rank, adapter=adapter), text="hi")


@asynchronous
async def test_what_a_dead_scheduler_had_goes_on_elsewhere_at_once_and_the_rest_is_left_alone() -> None:
    async with fleet() as ring:
        with ring.client.open([asked("a", 0), asked("b", 1)]) as group:
            ring.transport.push(step("b", [5, 6], "xy"))
            await group.next()
            await ring.end(1)
            assert ring.generates == [("b", 0, 0, 1, pack_ids([5, 6]))]
            ring.transport.sent.clear()
            ring.start(1, epoch=1)
            await settle()
            assert ring.generates == []
            ring.client.open([asked("c", 1)])
            assert [(rid, rank, epoch) for rid, rank, epoch, _, _ in ring.generates] == [("c", 1, 1)]


@asynchronous
async def test_late_words_of_a_dead_scheduler_do_not_bring_it_back_nor_count_its_death_twice() -> None:
    async with fleet() as ring:
        await ring.end(0)
        ring.start(0)  # said before it ended
        await settle()
        assert not ring.client.schedulers.all[0].up
        noted = []
        ring.client._quarantine.service_died = lambda role, lost: noted.append(role)  # type: ignore[assignment, return-value]
        ring.start(0, epoch=1)
        await settle()
        assert ring.client.schedulers.all[0].up and noted == []


@asynchronous
async def test_when_the_last_one_dies_its_requests_wait_for_a_restart() -> None:
    async with fleet() as ring:
        with ring.client.open([asked("a", 0)]):
            await ring.end(1)
            await ring.end(0)
            assert ring.generates == []
            ring.start(1, epoch=1)
            ring.start(0, epoch=1)
            await settle()
            assert [(rid, epoch) for rid, _, epoch, _, _ in ring.generates] == [("a", 1)]


@asynchronous
async def test_aborts_go_to_the_scheduler_that_has_the_request() -> None:
    async with fleet() as ring:
        with ring.client.open([asked("a", 1)]):
            await ring.end(1)
        assert [(abort.rid, abort.rank) for abort in ring.sent(Abort)] == [("a", 0)]


@asynchronous
async def test_a_request_that_ends_schedulers_is_found_though_each_time_it_is_another() -> None:
    async with fleet() as ring:
        with ring.client.open([asked("poison", 0)]) as group:
            for deaths in range(3):
                rank = ring.generates[-1][1]
                await ring.end(rank, ring.generates[-1][2] if deaths else 0)
                ring.start(rank, epoch=deaths + 1)
                await settle()
                for probe in [probe for probe in ring.sent(Probe) if probe.id.startswith("clear")]:
                    await ring.say(probe)
                if not ring.generates:
                    break
            [(_, text)] = await group.next()
            assert text.tokens.finish is not None and "given up" in text.tokens.finish.message


@asynchronous
async def test_a_command_has_one_answer_when_all_have_answered() -> None:
    async with fleet() as ring:
        flush = asyncio.create_task(ring.client.command(FlushCache(), 10))
        await settle()
        assert [(command.rank, command.epoch) for command in ring.sent(FlushCache)] == [(0, 0), (1, 0)]
        id = ring.sent(FlushCache)[0].id
        await ring.say(Reply(id=id, rank=1, message="done"))
        await ring.say(Reply(id=id, rank=1, message="done"))
        assert not flush.done()
        await ring.say(Reply(id=id, rank=0, message="done"))
        answer = await flush
        assert isinstance(answer, Reply) and answer.success


@asynchronous
async def test_a_command_that_changes_something_waits_until_all_are_there() -> None:
    async with fleet() as ring:
        await ring.end(1)
        pause = asyncio.create_task(ring.client.command(PauseGeneration(), 10))
        await settle()
        assert ring.sent(PauseGeneration) == []
        ring.start(1, epoch=1)
        await settle()
        assert [(command.rank, command.epoch) for command in ring.sent(PauseGeneration)] == [(0, 0), (1, 1)]
        await ring.end(0)
        with pytest.raises(RequestError) as lost:
            await pause
        assert lost.value.kind is Kind.UNAVAILABLE


@asynchronous
async def test_a_question_does_without_the_answer_of_a_dead_scheduler() -> None:
    async with fleet() as ring:
        probe = asyncio.create_task(ring.client.probe(10))
        await settle()
        answered = ring.sent(Probe)[0]
        answered.counters["scheduler"] = {"num_running_reqs": 1}
        await ring.say(answered)
        await ring.end(1)
        counters = await probe
        assert counters["scheduler DP0"] == {"num_running_reqs": 1}
        assert "scheduler DP1" not in counters


async def updating(ring: Fleet) -> "tuple[asyncio.Task[Any], str]":
    task = asyncio.create_task(ring.client.command(UpdateWeightsFromDisk(model_path="n", weight_version="v1"), 10))
    await settle()
    assert [command.waits_for_others for command in ring.sent(UpdateWeightsFromDisk)] == [True, True]
    return task, ring.sent(UpdateWeightsFromDisk)[0].id


def decisions(ring: Fleet) -> set[tuple[int, str]]:
    return {(decision.rank, decision.reason) for decision in ring.sent(DecideChange)}


@asynchronous
async def test_a_change_is_made_when_all_are_prepared() -> None:
    async with fleet() as ring:
        task, id = await updating(ring)
        await ring.say(Prepared(id=id, rank=0))
        assert decisions(ring) == set()
        await ring.say(Prepared(id=id, rank=1))
        assert decisions(ring) == {(0, ""), (1, "")}
        for rank in (0, 1):
            await ring.say(Reply(id=id, rank=rank, message="ok"))
        answer = await task
        assert (answer.success, answer.message) == (True, "ok | ok")
        ring.transport.sent.clear()
        await ring.say(Prepared(id=id, rank=1))  # it has not heard the decision
        assert decisions(ring) == {(1, "")}


@asynchronous
async def test_an_adapter_that_all_have_loaded_may_be_named_though_none_can_read_another_one_any_more() -> None:
    async with fleet() as ring:
        shown: list[Any] = []
        ring.client.on_facts = lambda facts: shown.append(facts.state["adapters"])
        ring.client.schedulers.decide(LoadAdapter(lora_name="lost", lora_path="/lost"))
        ring.client.schedulers.decide(LoadAdapter(lora_name="a", lora_path="/a"))
        await ring.say(*(facts(rank, adapters=[ADAPTER]) for rank in (0, 1)))
        assert shown[-1] == [ADAPTER]


@asynchronous
async def test_a_pause_that_is_lost_with_a_scheduler_is_made_up_for_before_it_gets_requests() -> None:
    async with fleet() as ring:
        task = asyncio.create_task(ring.client.command(PauseGeneration(mode="in_place"), 10))
        await settle()
        [first, second] = ring.sent(PauseGeneration)
        await ring.say(facts(0, paused=True), Reply(id=first.id, rank=first.rank))
        await ring.end(1)
        with pytest.raises(RequestError):
            await task
        ring.start(1, epoch=1)
        await settle()
        [pause] = ring.sent(PauseGeneration)
        assert (pause.rank, pause.epoch) == (1, 1) and pause.id != second.id
        ring.client.open([asked("a", 1)])
        assert ring.generates[-1][:2] == ("a", 0)
        await ring.say(facts(1, epoch=1, paused=True), Reply(id=pause.id, rank=1))
        ring.client.open([asked("b", 1)])
        assert ring.generates[-1][:2] == ("b", 1)


@asynchronous
async def test_memory_that_one_could_not_take_is_taken_when_there_is_some() -> None:
    async with fleet() as ring:
        ring.client.schedulers.decide(ReleaseMemory())
        await ring.say(*(facts(rank, lacks=["kv_cache", "weights"]) for rank in (0, 1)))
        task = asyncio.create_task(ring.client.command(ResumeMemory(), 10))
        await settle()
        id = ring.sent(ResumeMemory)[0].id
        await ring.say(facts(0), Reply(id=id, rank=0))
        ring.transport.sent.clear()
        await ring.say(Reply(id=id, rank=1, success=False, status=503, message="no room"))
        assert not (await task).success
        await ring.say(facts(1, lacks=["kv_cache", "weights"]))
        [resume] = ring.sent(ResumeMemory)
        assert (resume.rank, resume.tags) == (1, ["kv_cache", "weights"])


@pytest.mark.parametrize("other", ["read", "rewritten"])
@asynchronous
async def test_an_update_is_made_only_where_all_have_read_the_same_files(other: str) -> None:
    async with fleet() as ring:
        task, id = await updating(ring)
        await ring.say(*(Prepared(id=id, rank=rank, weight_files=read) for rank, read in enumerate(("read", other))))
        decided = ring.client.schedulers.decided
        assert decided is not None
        if other == "read":
            assert decisions(ring) == {(0, ""), (1, "")}
            assert decided.served.weights == ("n", "v1", "read")
        else:
            assert {("rewritten while" in reason) for _, reason in decisions(ring)} == {True}
            assert decided.served.weights == ("m", "v0", "")
        task.cancel()


@asynchronous
async def test_an_update_without_a_version_gives_all_the_version_that_was_decided() -> None:
    async with fleet() as ring:
        await ring.say(facts(1, version="v0-rewritten", weight_files="new"))
        task = asyncio.create_task(ring.client.command(UpdateWeightsFromDisk(model_path="m"), 10))
        await settle()
        id = ring.sent(UpdateWeightsFromDisk)[0].id
        await ring.say(Prepared(id=id, rank=0), Prepared(id=id, rank=1))
        assert {(word.rank, word.reason, word.weight_version) for word in ring.sent(DecideChange)} == {
            (0, "", "v0"),
            (1, "", "v0"),
        }
        task.cancel()


@asynchronous
async def test_a_change_of_a_version_that_was_renamed_meanwhile_is_not_made() -> None:
    async with fleet() as ring:
        update = UpdateWeightsFromDisk(model_path="n", weight_version="v1", expected_version="v0")
        task = asyncio.create_task(ring.client.command(update, 10))
        await settle()
        id = ring.sent(UpdateWeightsFromDisk)[0].id
        await ring.say(Prepared(id=id, rank=0))
        rename = asyncio.create_task(ring.client.command(UpdateWeightVersion(new_version="v9"), 10))
        await settle()
        await ring.say(Prepared(id=id, rank=1))
        conflict = "Weight version v0 was expected, v9 is served."
        assert decisions(ring) == {(0, conflict), (1, conflict)}
        decided = ring.client.schedulers.decided
        assert decided is not None and decided.served.weights == ("m", "v9", "")
        for waiting in (task, rename):
            waiting.cancel()


@asynchronous
async def test_the_version_that_is_expected_is_that_which_clients_get() -> None:
    """And no scheduler refuses an update because it serves nobody with its own."""
    update = UpdateWeightsFromDisk(model_path="m", weight_version="v1", expected_version="v0")
    async with fleet() as ring:
        await ring.say(facts(1, version="v0-rewritten", weight_files="new"))
        task = asyncio.create_task(ring.client.command(update, 10))
        await settle()
        sent = ring.sent(UpdateWeightsFromDisk)
        assert {one.rank: one.expected_version for one in sent} == {0: "v0", 1: None}
        await ring.say(*(Prepared(id=sent[0].id, rank=rank, weight_files="new") for rank in (0, 1)))
        assert decisions(ring) == {(0, ""), (1, "")}
        task.cancel()


@pytest.mark.parametrize("expected", ["v0", "v0-rewritten"])
@asynchronous
async def test_where_the_weights_of_all_were_rewritten_their_own_version_is_expected(expected: str) -> None:
    update = UpdateWeightsFromDisk(model_path="m", weight_version="v1", expected_version=expected)
    async with fleet() as ring:
        await ring.say(*(facts(rank, version="v0-rewritten", weight_files="new") for rank in (0, 1)))
        task = asyncio.create_task(ring.client.command(update, 10))
        await settle()
        sent = ring.sent(UpdateWeightsFromDisk)
        assert {one.rank: one.expected_version for one in sent} == {0: expected, 1: expected}
        await ring.say(*(Prepared(id=sent[0].id, rank=rank, weight_files="new") for rank in (0, 1)))
        refused = "" if expected == "v0-rewritten" else "Weight version v0 was expected, v0-rewritten is served."
        assert decisions(ring) == {(0, refused), (1, refused)}
        task.cancel()


@asynchronous
async def test_weights_that_were_rewritten_do_not_get_the_name_of_the_others() -> None:
    async with fleet() as ring:
        await ring.say(facts(1, version="v0-rewritten", weight_files="new"))
        task = asyncio.create_task(ring.client.command(UpdateWeightVersion(new_version="v1"), 10))
        await settle()
        [rename] = ring.sent(UpdateWeightVersion)
        assert rename.rank == 0
        await ring.say(facts(0, version="v1"), Reply(id=rename.id, rank=0))
        await task
        assert ring.client.schedulers.is_behind(1)
        ring.client.open([asked("a", 1)])
        assert ring.generates[-1][:2] == ("a", 0)


@asynchronous
async def test_where_the_weights_of_all_were_rewritten_clients_hear_so_when_the_last_one_speaks() -> None:
    async with fleet() as ring:
        shown: list[str] = []
        ring.client.on_facts = lambda facts: shown.append(facts.state["weight_version"])
        await ring.end(0)
        await ring.end(1)
        ring.start(0, epoch=1, version="v0-rewritten", weight_files="new")
        await settle()
        assert shown[-1] == "v0", "the other one may come back with it"
        ring.start(1, epoch=1, version="v0-rewritten", weight_files="new")
        await settle()
        assert shown[-1] == "v0-rewritten"


@asynchronous
async def test_where_the_weights_of_all_were_rewritten_a_new_name_is_for_all() -> None:
    async with fleet() as ring:
        await ring.say(*(facts(rank, version="v0-rewritten", weight_files="new") for rank in (0, 1)))
        task = asyncio.create_task(ring.client.command(UpdateWeightVersion(new_version="v1"), 10))
        await settle()
        assert [rename.rank for rename in ring.sent(UpdateWeightVersion)] == [0, 1]
        task.cancel()


@asynchronous
async def test_a_refusal_by_one_is_one_for_all_with_its_own_reason() -> None:
    async with fleet() as ring:
        task, id = await updating(ring)
        await ring.say(Prepared(id=id, rank=0))
        await ring.say(Reply(id=id, rank=1, success=False, status=400, message="broken"))
        assert decisions(ring) == {(0, "Another scheduler refused: broken")}
        await ring.say(Reply(id=id, rank=0, success=False, status=503, message="Another scheduler refused: broken"))
        answer = await task
        assert (answer.success, answer.status, answer.message) == (False, 400, "broken")


@asynchronous
async def test_a_death_before_the_decision_ends_the_change_and_one_behind_it_does_not() -> None:
    async with fleet() as ring:
        task, id = await updating(ring)
        await ring.say(Prepared(id=id, rank=0))
        await ring.end(1)
        [(rank, reason)] = decisions(ring)
        assert rank == 0 and "a scheduler ended" in reason
        await ring.say(Reply(id=id, rank=0, success=False, status=503, message=reason))
        assert not (await task).success
        ring.start(1, epoch=1)
        await settle()
        ring.transport.sent.clear()
        task, id = await updating(ring)
        await ring.say(Prepared(id=id, rank=0), Prepared(id=id, rank=1))
        await ring.end(1, epoch=1)
        await ring.say(Reply(id=id, rank=0, message="ok"))
        assert (await task).success


@asynchronous
async def test_who_comes_back_amid_a_change_gets_no_requests_before_it_serves_what_the_others_do() -> None:
    async with fleet() as ring:
        task, id = await updating(ring)
        await ring.say(Prepared(id=id, rank=0), Prepared(id=id, rank=1))
        await ring.end(1)
        ring.start(1, epoch=1)
        await settle()
        ring.client.open([asked("a", 1)])
        assert ring.generates[-1][:2] == ("a", 0)
        await ring.say(facts(0, version="v1", path="n"), Reply(id=id, rank=0, message="ok"))
        assert (await task).success
        ring.client.open([asked("b", 1)])
        assert ring.generates[-1][:2] == ("b", 0)


@asynchronous
async def test_a_change_that_nobody_waits_for_is_not_made() -> None:
    async with fleet() as ring:
        await ring.say(Prepared(id="of an earlier gateway", rank=1))
        [(rank, reason)] = decisions(ring)
        assert rank == 1 and "nobody waits" in reason


@asynchronous
async def test_a_new_gateway_has_all_make_what_the_one_before_has_decided(tmp_path: Path) -> None:
    async with fleet(str(tmp_path)) as ring:
        _, id = await updating(ring)
        await ring.say(Prepared(id=id, rank=0), Prepared(id=id, rank=1))
    async with fleet(str(tmp_path)) as ring:
        await ring.say(Prepared(id=id, rank=1), Prepared(id="another", rank=1))
        assert [(decision.change, decision.reason == "") for decision in ring.sent(DecideChange)] == [
            (id, True),
            ("another", False),
        ]


@pytest.mark.parametrize("renamed", [False, True])
@asynchronous
async def test_a_scheduler_that_comes_back_with_other_weights_gets_what_was_decided_first(renamed: bool) -> None:
    async with fleet() as ring:
        command = (
            UpdateWeightVersion(new_version="v1")
            if renamed
            else UpdateWeightsFromDisk(model_path="n", weight_version="v1")
        )
        served = {"version": "v1", "path": "m" if renamed else "n"}
        ring.client.schedulers.decide(command)
        await ring.say(facts(0, **served), facts(1, **served))
        await ring.end(1)
        ring.start(1, epoch=1)
        await settle()
        [command] = ring.sent(type(command))
        assert (command.rank, command.epoch) == (1, 1)
        assert not command.waits_for_others
        ring.client.open([asked("a", 1)])
        assert ring.generates[-1][:2] == ("a", 0)
        await ring.say(facts(1, epoch=1, **served), Reply(id=command.id, rank=1))
        ring.client.open([asked("b", 1)])
        assert ring.generates[-1][:2] == ("b", 1)


@asynchronous
async def test_a_scheduler_that_comes_back_gets_the_adapters_that_were_decided_and_shows_none_of_its_own() -> None:
    async with fleet() as ring:
        shown: list[Any] = []
        ring.client.on_facts = lambda facts: shown.append(facts.state.get("adapters"))
        kept, late, gone = (ADAPTER | {"name": name, "path": f"/{name}"} for name in ("kept", "late", "gone"))
        for name in ("kept", "late"):
            ring.client.schedulers.decide(LoadAdapter(lora_name=name, lora_path=f"/{name}"))
        for rank in (0, 1):
            await ring.say(facts(rank, adapters=[kept, late]))
        await ring.end(1)
        shown.clear()
        await ring.say(facts(1, epoch=1, adapters=[kept, gone]))
        [unload] = ring.sent(UnloadAdapter)
        assert (unload.lora_name, unload.rank, unload.epoch) == ("gone", 1, 1)
        await ring.say(facts(1, epoch=1, adapters=[kept]), Reply(id=unload.id, rank=1))
        [load] = ring.sent(LoadAdapter)
        assert (load.lora_name, load.lora_path, load.rank, load.waits_for_others) == ("late", "/late", 1, False)
        assert shown == [[kept, late], [kept, late]], "the other one has it"
        ring.client.open([asked("a", 1)])
        assert ring.generates[-1][:2] == ("a", 0)
        await ring.say(facts(1, epoch=1, adapters=[kept, late]), Reply(id=load.id, rank=1))
        assert shown == [[kept, late]] * 3
        ring.client.open([asked("b", 1)])
        assert ring.generates[-1][:2] == ("b", 1)


@asynchronous
async def test_where_no_scheduler_has_a_decided_adapter_its_requests_wait_until_theirs_is_given_it() -> None:
    async with fleet() as ring:
        ring.client.schedulers.decide(LoadAdapter(lora_name="a", lora_path="/a"))
        with ring.client.open([asked("x", 0, "a"), asked("y", 1, "a"), asked("base", 1)]):
            assert [rid for rid, *_ in ring.generates] == ["base"]
            ring.start(1)
            await settle()
            given = [(command.lora_name, command.rank) for command in ring.sent(LoadAdapter)]
            assert given == [("a", 1)] and len(ring.generates) == 1
            ring.start(1, adapters=[ADAPTER])
            await settle()
            assert [(rid, rank) for rid, rank, *_ in ring.generates] == [("base", 1), ("y", 1)]
            ring.transport.sent.clear()
            await ring.end(0)
            assert [(rid, rank) for rid, rank, *_ in ring.generates] == [("x", 1)]


@asynchronous
async def test_a_request_waits_for_its_adapter_also_when_its_scheduler_has_died_while_it_was_given_it() -> None:
    async with fleet() as ring:
        ring.client.schedulers.decide(LoadAdapter(lora_name="a", lora_path="/a"))
        with ring.client.open([asked("x", 0, "a")]):
            ring.start(0)
            await settle()
            assert ring.sent(LoadAdapter)
            await ring.end(0)
            ring.transport.sent.clear()
            ring.start(0, epoch=1)
            await settle()
            assert [command.rank for command in ring.sent(LoadAdapter)] == [0] and ring.generates == []
            ring.start(0, epoch=1, adapters=[ADAPTER | {"pinned": True}])
            await settle()
            assert [(rid, rank, epoch) for rid, rank, epoch, *_ in ring.generates] == [("x", 0, 1)]


@asynchronous
async def test_a_request_does_not_wait_for_an_adapter_that_its_scheduler_cannot_be_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(levelling, "LOOK_AFTER_S", 0.0)
    async with fleet() as ring:
        ring.client.schedulers.decide(LoadAdapter(lora_name="a", lora_path="/a"))
        with ring.client.open([asked("x", 0, "a")]):
            ring.start(0)
            await settle()
            while not ring.generates:
                tries = ring.sent(LoadAdapter)
                ring.transport.sent.clear()
                await ring.say(
                    *(Reply(id=command.id, rank=0, success=False, message="unreadable") for command in tries)
                )
            assert [rid for rid, *_ in ring.generates] == ["x"]


@pytest.mark.parametrize("left_by", [0, 1])
@asynchronous
async def test_an_adapter_that_is_being_unloaded_stays_so_though_a_scheduler_dies_and_the_command_is_lost(
    left_by: int,
) -> None:
    async with fleet() as ring:
        ring.client.schedulers.decide(LoadAdapter(lora_name="a", lora_path="/a"))
        await ring.say(*(facts(rank, adapters=[ADAPTER]) for rank in (0, 1)))
        task = asyncio.create_task(ring.client.command(UnloadAdapter(lora_name="a"), 10))
        await settle()
        await ring.end(left_by)
        with pytest.raises(RequestError):
            await task
        await ring.say(facts(1 - left_by))  # it has unloaded it
        ring.start(left_by, epoch=1, adapters=[ADAPTER])
        await settle()
        [unload] = ring.sent(UnloadAdapter)
        assert (unload.rank, unload.epoch) == (left_by, 1)
        assert ring.sent(LoadAdapter) == []


@asynchronous
async def test_a_command_that_nobody_waits_for_any_more_is_decided_all_the_same() -> None:
    async with fleet() as ring:
        ring.client.schedulers.decide(LoadAdapter(lora_name="a", lora_path="/a"))
        await ring.say(*(facts(rank, adapters=[ADAPTER]) for rank in (0, 1)))
        with pytest.raises(TimeoutError):
            await ring.client.command(UnloadAdapter(lora_name="a"), 0)
        await ring.say(facts(0), facts(1))
        assert not ring.client.schedulers.is_behind(0) and not ring.client.schedulers.is_behind(1)
        assert ring.sent(LoadAdapter) == []


@asynchronous
async def test_a_change_that_one_refuses_is_not_decided() -> None:
    async with fleet() as ring:
        before = ring.client.schedulers.decided
        task, id = await updating(ring)
        await ring.say(Prepared(id=id, rank=0))
        assert ring.client.schedulers.decided == before
        await ring.say(Reply(id=id, rank=1, success=False, status=400, message="broken"))
        await ring.say(Reply(id=id, rank=0, success=False, status=503, message="not all"))
        assert not (await task).success
        assert ring.client.schedulers.decided == before


@asynchronous
async def test_a_command_that_only_some_have_carried_out_says_which() -> None:
    async with fleet() as ring:
        flush = asyncio.create_task(ring.client.command(FlushCache(), 10))
        await settle()
        id = ring.sent(FlushCache)[0].id
        await ring.say(Reply(id=id, rank=0), Reply(id=id, rank=1, success=False, status=400, message="Busy."))
        answer = await flush
        assert isinstance(answer, Reply)
        assert (answer.success, answer.status) == (False, 400)
        assert answer.message == "Busy (scheduler DP1; it was done in DP0)."


@pytest.mark.parametrize("decided", [False, True])
@asynchronous
async def test_memory_is_released_by_all_or_none_and_a_death_behind_the_decision_is_told(decided: bool) -> None:
    async with fleet() as ring:
        release = asyncio.create_task(ring.client.command(ReleaseMemory(), 10))
        await settle()
        id = ring.sent(ReleaseMemory)[0].id
        await ring.say(*[Prepared(id=id, rank=rank) for rank in ((0, 1) if decided else (0,))])
        await ring.end(1)
        assert {rank for rank, reason in decisions(ring) if reason} == (set() if decided else {0})
        if decided:  # the one that died has the memory when it is back
            with pytest.raises(RequestError):
                await release
        else:
            await ring.say(Reply(id=id, rank=0, success=False, status=503, message="not all"))
            assert not (await release).success


@asynchronous
async def test_a_new_gateway_asks_each_scheduler_for_its_facts() -> None:
    async with fleet() as ring:
        ring.client.ask_facts()
        assert [(message.role, message.rank) for message in ring.sent(Restarted)] == [("gateway", 0), ("gateway", 1)]
