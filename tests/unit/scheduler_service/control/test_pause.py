"""Pausing in three ways, and giving memory back for a while."""

import itertools
from pathlib import Path

import pytest

from quartet.runtime.control import (
    CheckWeights,
    ContinueGeneration,
    FlushCache,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    SlowDown,
    UpdateWeightsFromDisk,
)
from quartet.runtime.messages import Reply, unpack_ids
from quartet.runtime.process.memory import Memory
from quartet.scheduler_service.execution.memory_saver import MemorySaver
from tests import checkpoints
from tests.live import Live
from tests.rig import PROMPT, Rig
from tests.stepper import expected_output, tokenized

ids = itertools.count()


def call(rig: Rig, command: PauseGeneration | ContinueGeneration | FlushCache | SlowDown) -> Reply:
    """Step until the command is answered, for at most a few steps."""
    command.id = f"call {next(ids)}"
    rig.inbox.put(command)
    for _ in range(5):
        rig.scheduler.step()
        if replies := [m for m in rig.outbox.messages if isinstance(m, Reply)]:
            rig.outbox.frames = [[m for m in frame if not isinstance(m, Reply)] for frame in rig.outbox.frames]
            return replies[-1]
    raise AssertionError(f"{command} is not answered")


def output(rig: Rig, rid: str) -> list[int]:
    return [id for message in rig.tokens(rid) for id in unpack_ids(message.ids)]


def busy(depth: int = 0) -> Rig:
    """Two requests run, one waits."""
    rig = Rig(depth, max_running=2)
    rig.inbox.put(*(tokenized(rid, PROMPT, 20) for rid in "abc"))
    for _ in range(4):
        rig.scheduler.step()
    return rig


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_paused_requests_go_on_where_they_stopped(mode: str, depth: int) -> None:
    rig = busy(depth)
    assert call(rig, PauseGeneration(mode=mode)).message == "Generation paused successfully."  # type: ignore[arg-type]
    assert not rig.scheduler.launched
    held = [output(rig, rid) for rid in "abc"]
    for _ in range(5):
        rig.scheduler.step()
    assert [output(rig, rid) for rid in "abc"] == held
    assert len(rig.scheduler.planner.running) == (0 if mode == "retract" else 2)
    rig.scheduler.planner.check_invariants()
    assert call(rig, ContinueGeneration()).message == "Generation continued successfully."
    rig.run()
    assert all(output(rig, rid) == expected_output(PROMPT, 20) for rid in "abc")


@pytest.mark.parametrize("depth", [0, 1])
def test_a_pause_may_end_all_requests_with_what_they_have(depth: int) -> None:
    rig = busy(depth)
    call(rig, PauseGeneration())
    assert rig.scheduler.planner.idle
    lasts = [rig.tokens(rid)[-1].finish for rid in "abc"]
    assert [last.reason for last in lasts if last] == ["abort"] * 3
    assert lasts[2].message == "Abort before prefill"  # type: ignore[union-attr]
    assert rig.scheduler.planner.audit() == ""


@pytest.mark.parametrize("depth", [0, 1])
def test_a_pause_that_is_ended_before_its_answer_is_answered_and_pauses_nothing(depth: int) -> None:
    rig = busy(depth)
    rig.inbox.put(PauseGeneration(id="pause", mode="in_place"), ContinueGeneration(id="continue"))
    for _ in range(3):
        rig.scheduler.step()
    bodies = {m.id: m.body for m in rig.outbox.messages if isinstance(m, Reply)}
    assert bodies.keys() == {"pause", "continue"} and not rig.scheduler.planner.paused
    assert list(bodies.values())[-1] == {"paused": False}


def test_new_requests_wait_while_paused() -> None:
    rig = Rig()
    call(rig, PauseGeneration())
    rig.inbox.put(tokenized("late", PROMPT, 3))
    rig.run()
    assert rig.tokens("late") == [] and len(rig.scheduler.planner.waiting) == 1
    call(rig, ContinueGeneration())
    rig.run()
    assert output(rig, "late") == expected_output(PROMPT, 3)


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_pausing_twice_and_continuing_twice_answer_the_same(mode: str) -> None:
    rig = busy()
    pauses = [call(rig, PauseGeneration(mode=mode)) for _ in range(2)]  # type: ignore[arg-type]
    continues = [call(rig, ContinueGeneration()) for _ in range(2)]
    for first, second in (pauses, continues):
        assert (first.success, first.message, first.body) == (second.success, second.message, second.body)
    rig.run()
    assert all(rig.tokens(rid)[-1].finish for rid in "abc")


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_the_cache_of_a_paused_server_can_be_flushed(mode: str) -> None:
    rig = busy()
    call(rig, PauseGeneration(mode=mode))  # type: ignore[arg-type]
    assert call(rig, FlushCache()).success
    call(rig, ContinueGeneration())
    rig.run()
    if mode != "abort":
        assert all(output(rig, rid) == expected_output(PROMPT, 20) for rid in "abc")


def test_a_retraction_that_was_asked_for_is_not_reported_as_a_full_pool(caplog: pytest.LogCaptureFixture) -> None:
    rig = busy()
    call(rig, PauseGeneration(mode="retract"))
    call(rig, ContinueGeneration())
    rig.run()
    assert "KV cache pool is full" not in caplog.text


def test_every_step_can_be_slowed_down() -> None:
    rig = Rig()
    call(rig, SlowDown(forward_sleep_time=0.25))
    assert rig.scheduler.step_sleep_s == 0.25
    call(rig, SlowDown())
    assert rig.scheduler.step_sleep_s == 0.0


# memory

ALL = ["cuda_graph", "kv_cache", "weights"]
TOKEN = 50


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.version_model(tmp_path / "model", TOKEN)


AWAKE = {"asleep": False, "lacks": []}


def saving(model: Path, tmp_path: Path, **settings: object) -> Live:
    return Live(model, tmp_path, enable_memory_saver=True, **settings)


def answered(live: Live, rid: str) -> list[int]:
    live.send(tokenized(rid, PROMPT, 3))
    live.run()
    return live.output(rid)


def test_without_the_flag_memory_is_not_released(model: Path, tmp_path: Path) -> None:
    reply = Live(model, tmp_path).call(ReleaseMemory())
    assert reply.status == 400 and "--enable-memory-saver" in reply.message


def test_released_memory_is_gone_and_comes_back(model: Path, tmp_path: Path) -> None:
    live = saving(model, tmp_path, enable_weights_cpu_backup=True)
    before = live.logits(PROMPT)
    assert live.call(ReleaseMemory()).body == {"asleep": True, "lacks": ["weights", "kv_cache"]}
    buffers = live.updates.live.buffers.values()
    assert sum(buffer.untyped_storage().nbytes() for buffer in buffers) < 100 and not live.worker.cache.keys
    assert live.call(ReleaseMemory(tags=["weights"])).success
    live.send(tokenized("x", PROMPT, 3))
    live.run()
    assert live.output("x") == []
    for _ in range(2):
        assert live.call(ResumeMemory(tags=ALL)).body == AWAKE
    live.run()
    assert live.output("x") == [TOKEN] * 3
    assert live.logits(PROMPT) == before


def test_weights_without_a_backup_must_be_written_before_anything_is_generated(model: Path, tmp_path: Path) -> None:
    """The trainers' order: release all, resume weights, update, resume the cache."""
    live = saving(model, tmp_path)
    live.call(ReleaseMemory())
    assert live.call(UpdateWeightsFromDisk(model_path=str(model))).status == 400
    assert live.call(CheckWeights()).status == 400
    live.call(ResumeMemory(tags=["weights"]))
    live.call(ResumeMemory(tags=["kv_cache", "cuda_graph"]))
    assert answered(live, "x") == []
    live.call(UpdateWeightsFromDisk(model_path=str(checkpoints.version_model(tmp_path / "new", TOKEN + 1))))
    live.run()
    assert live.output("x") == [TOKEN + 1] * 3


def test_released_graphs_alone_stop_no_step(model: Path, tmp_path: Path) -> None:
    """A step that wants a graph records it again. Trainers resume weights and cache, and leave this tag out."""
    live = saving(model, tmp_path, enable_weights_cpu_backup=True)
    assert live.call(ReleaseMemory(tags=["cuda_graph"])).body == AWAKE
    assert answered(live, "first") == [TOKEN] * 3
    live.call(ReleaseMemory())
    assert live.call(ResumeMemory(tags=["weights"])).body == {"asleep": True, "lacks": ["kv_cache"]}
    assert live.call(ResumeMemory(tags=["kv_cache"])).body == AWAKE
    assert answered(live, "second") == [TOKEN] * 3


def test_memory_is_released_and_resumed_once_other_ranks_are_free(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, busy = saving(model, tmp_path, enable_weights_cpu_backup=True), [True]
    monkeypatch.setattr(MemorySaver, "must_wait", property(lambda saver: busy[0]))
    for command, lacks in ((ReleaseMemory(), ["weights", "kv_cache"]), (ResumeMemory(), [])):
        busy[0] = True
        before = live.scheduler.saver.lacks  # type: ignore[union-attr]
        reply = live.begin(command)
        live.step(3)
        assert live.scheduler.saver.lacks == before  # type: ignore[union-attr]
        busy[0] = False
        assert live.wait(reply).body == {"asleep": bool(lacks), "lacks": lacks}
    assert answered(live, "x") == [TOKEN] * 3


SUBSETS = [list(tags) for size in range(1, 4) for tags in itertools.permutations(ALL, size)]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("released", [None, [], *SUBSETS])
def test_released_tags_are_resumed_one_by_one_in_any_order(
    model: Path, tmp_path: Path, released: list[str] | None, twice: bool
) -> None:
    live = saving(model, tmp_path, enable_weights_cpu_backup=True)
    before = live.logits(PROMPT)
    for _ in range(1 + twice):
        assert live.call(ReleaseMemory(tags=released)).success
    gone = [tag for tag in ("weights", "kv_cache") if tag in (released or ALL)]
    for tag in reversed(released or ALL):
        assert live.planner.asleep == bool(gone)
        for _ in range(1 + twice):
            gone = [other for other in gone if other != tag]
            assert live.call(ResumeMemory(tags=[tag])).body == {"asleep": bool(gone), "lacks": gone}
    assert answered(live, "x") == [TOKEN] * 3
    assert live.logits(PROMPT) == before


@pytest.mark.parametrize("tags", [["weights", "graphs"], ["graphs"], [""]])
def test_a_list_of_tags_with_an_unknown_one_changes_nothing(model: Path, tmp_path: Path, tags: list[str]) -> None:
    live = saving(model, tmp_path)
    for command in (ReleaseMemory(tags=tags), ResumeMemory(tags=tags)):
        reply = live.call(command)
        assert reply.status == 400 and "is unknown" in reply.message
    assert not live.scheduler.saver.released  # type: ignore[union-attr]
    assert answered(live, "x") == [TOKEN] * 3


def test_the_update_that_writes_released_weights_reports_that_steps_run_again(model: Path, tmp_path: Path) -> None:
    live = saving(model, tmp_path)
    live.call(ReleaseMemory())
    assert live.call(ResumeMemory()).body == {"asleep": True, "lacks": []}
    body = live.call(UpdateWeightsFromDisk(model_path=str(model))).body
    assert body is not None and (body["asleep"], body["lacks"]) == (False, [])


def test_memory_of_running_requests_is_not_released(model: Path, tmp_path: Path) -> None:
    live = saving(model, tmp_path)
    live.send(tokenized("x", PROMPT, 100, ignore_eos=True))
    live.step(3)
    reply = live.call(ReleaseMemory())
    assert reply.status == 400 and "while requests run" in reply.message
    live.call(PauseGeneration(mode="retract"))
    assert live.call(ReleaseMemory(tags=["kv_cache"])).success
    live.call(ResumeMemory())
    live.call(ContinueGeneration())
    live.run()
    assert live.output("x") == [TOKEN] * 100


def test_resuming_memory_that_another_process_holds_can_be_retried(model: Path, tmp_path: Path) -> None:
    live = saving(model, tmp_path, enable_weights_cpu_backup=True)
    live.call(ReleaseMemory())
    cache = live.worker.cache
    wanted, cache._shapes = cache._shapes, {0: (1, 1 << 50, 8)}  # no machine has that much
    reply = live.call(ResumeMemory())
    assert reply.status == 503 and reply.message.startswith("Memory cannot be resumed: ")
    assert live.planner.asleep
    cache._shapes = wanted
    assert live.call(ResumeMemory()).body == AWAKE
    assert answered(live, "x") == [TOKEN] * 3


def test_weights_are_not_resumed_if_memory_is_short(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = saving(model, tmp_path, enable_weights_cpu_backup=True)
    live.call(ReleaseMemory())
    with monkeypatch.context() as others:
        others.setattr("quartet.runtime.process.memory.look", lambda: Memory(1 << 10, 1 << 30, "a limit"))
        reply = live.call(ResumeMemory())
    assert reply.status == 503 and reply.message.startswith(
        "Memory cannot be resumed: there is no room for the weights"
    )
    assert live.planner.asleep
    assert live.call(ResumeMemory()).body["asleep"] is False
    assert answered(live, "x") == [TOKEN] * 3


def test_an_unknown_tag_is_named(model: Path, tmp_path: Path) -> None:
    assert "The tag graphs is unknown" in saving(model, tmp_path).call(ReleaseMemory(tags=["graphs"])).message
