"""Changes that all schedulers make, or none: what one of them does until it hears the decision."""

from pathlib import Path

import pytest

from quartet.runtime.adapters import LoadAdapter
from quartet.runtime.control import DecideChange, ReleaseMemory, ResumeMemory, UpdateWeightsFromDisk
from quartet.runtime.messages import Prepared
from quartet.scheduler_service.execution.memory_saver import MemorySaver
from quartet.scheduler_service.weights.update import Updates
from tests import checkpoints
from tests.adapters import write_adapter
from tests.live import Live
from tests.stepper import tokenized

STEPS = 200


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(tmp_path: Path, clock: Clock) -> Live:
    return Live(checkpoints.random_model(tmp_path / "a", 0), tmp_path, clock=clock, weight_version="A")


def begun(live: Live, tmp_path: Path) -> str:
    """An update that is prepared and waits."""
    checkpoints.random_model(tmp_path / "b", 1)
    command = UpdateWeightsFromDisk(model_path=str(tmp_path / "b"), weight_version="B", waits_for_others=True)
    id = live.begin(command)
    wait_prepared(live, id)
    live.step(STEPS)
    assert live.reply(id) is None
    assert live.worker.weight_version == "A"
    return id


def wait_prepared(live: Live, id: str) -> None:
    live.step_until(lambda: id in said(live), f"{id} is prepared")


def said(live: Live) -> list[str]:
    return [message.id for message in live.outbox.messages if isinstance(message, Prepared)]


def test_prepared_weights_wait_for_the_decision_and_say_so_once_a_second(
    live: Live, tmp_path: Path, clock: Clock
) -> None:
    id = begun(live, tmp_path)
    assert said(live) == [id]
    clock.now += 1.0
    live.step(2)
    assert said(live) == [id, id]
    live.send(DecideChange(change=id))
    assert live.wait(id).success
    assert live.worker.weight_version == "B"


def test_an_update_without_a_version_gets_the_one_that_all_serve_then(live: Live, tmp_path: Path) -> None:
    live.worker.weight_version = "A-rewritten"
    checkpoints.random_model(tmp_path / "b", 1)
    id = live.begin(UpdateWeightsFromDisk(model_path=str(tmp_path / "b"), waits_for_others=True))
    live.send(DecideChange(change=id, weight_version="A"))
    assert live.wait(id).success
    assert live.worker.weight_version == live.updates.committed.weight_version == "A"


def test_a_change_that_not_all_make_is_refused_and_leaves_what_serves(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[Updates] = []
    monkeypatch.setattr(Updates, "drop_staged", lambda updates: dropped.append(updates))
    id = begun(live, tmp_path)
    live.send(DecideChange(change=id, reason="another one is broken"))
    reply = live.wait(id)
    assert (reply.success, reply.status, reply.message) == (False, 503, "another one is broken")
    assert live.worker.weight_version == "A"
    assert dropped == [live.updates], "other ranks hold what they have staged until they are told"
    assert live.call(UpdateWeightsFromDisk(model_path=str(tmp_path / "b"), weight_version="B")).success


@pytest.mark.parametrize("reason", ["", "another one runs requests"])
def test_memory_waits_for_the_others_and_no_request_begins_meanwhile(tmp_path: Path, reason: str) -> None:
    live = Live(
        checkpoints.random_model(tmp_path / "a", 0), tmp_path, enable_memory_saver=True, enable_weights_cpu_backup=True
    )
    id = live.begin(ReleaseMemory(tags=["kv_cache"], waits_for_others=True))
    live.send(tokenized("x", range(5), 3))
    live.step(STEPS)
    assert live.reply(id) is None
    assert live.output("x") == []
    live.send(DecideChange(change=id, reason=reason))
    reply = live.wait(id)
    assert (reply.success, reply.message) == (not reason, reason)
    if not reason:
        assert live.output("x") == []
        assert live.call(ResumeMemory()).success
    live.run()
    assert len(live.output("x")) == 3


def test_memory_waits_for_busy_ranks_while_requests_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = [True]
    monkeypatch.setattr(MemorySaver, "must_wait", property(lambda _: busy[0]))
    live = Live(checkpoints.random_model(tmp_path / "a", 0), tmp_path, enable_memory_saver=True)
    id = live.begin(ReleaseMemory(tags=["kv_cache"], waits_for_others=True))
    live.send(tokenized("x", range(5), 3))
    live.run()
    live.step(STEPS)
    assert len(live.output("x")) == 3 and not said(live)
    busy.clear()
    busy.append(False)
    live.step()
    assert said(live) == [id] and live.planner.asleep
    live.send(DecideChange(change=id))
    assert live.wait(id).success


def test_an_adapter_that_not_all_can_load_is_served_by_none(tmp_path: Path) -> None:
    base = checkpoints.random_model(tmp_path / "a", 0)
    adapter = write_adapter(base, tmp_path / "adapter")
    live = Live(base, tmp_path, enable_lora=True)
    assert live.adapters is not None
    for reason in ("another one cannot read it", ""):
        command = LoadAdapter(lora_name="x", lora_path=str(adapter), waits_for_others=True)
        id = live.begin(command)
        wait_prepared(live, id)
        assert not live.adapters.is_served("x")
        live.send(DecideChange(change=id, reason=reason))
        assert live.wait(id).success == (not reason)
        assert live.adapters.is_served("x") == (not reason)
