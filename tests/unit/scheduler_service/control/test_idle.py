"""A server that sleeps while nothing is asked."""

import gc
import time
import weakref
from pathlib import Path

import pytest

from quartet.runtime.control import (
    BeginWeightUpdate,
    PauseGeneration,
    Probe,
    ReleaseMemory,
    ResumeMemory,
    UpdateWeightsFromDisk,
)
from quartet.scheduler_service.control.idle import MOST_TRIES, RETRY_S, WakeFailed
from tests import checkpoints
from tests.live import DEADLINE_S, Live
from tests.rig import PROMPT
from tests.stepper import tokenized

TOKEN = 100
AFTER_S = 60.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.version_model(tmp_path / "model", TOKEN)


class Idle(Live):
    """One that sleeps after a minute of its own clock."""

    def __init__(self, model: Path, run_dir: Path, **settings: object) -> None:
        self.now = 0.0
        more = {"sleep_when_idle_s": AFTER_S, "model_dir": str(model), **settings}
        super().__init__(model, run_dir, clock=lambda: self.now, **more)
        self.step()

    def pass_time(self, seconds: float = AFTER_S + 1) -> None:
        self.now += seconds
        self.step()

    @property
    def sleeping(self) -> bool:
        return self.scheduler.sleeping

    def weight_bytes(self) -> int:
        return sum(buffer.untyped_storage().nbytes() for buffer in self.updates.live.buffers.values())

    def until_awake(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.sleeping:
            assert time.monotonic() < deadline
            self.step()
        self.run()


def test_memory_is_given_back_after_a_while_and_the_next_request_takes_it_again(model: Path, tmp_path: Path) -> None:
    live = Idle(model, tmp_path)
    before, size = live.logits(PROMPT), live.weight_bytes()
    live.pass_time()
    assert live.sleeping and not live.worker.cache.keys and live.weight_bytes() < 100 < size
    live.send(tokenized("x", PROMPT, 3))
    live.step()
    assert live.output("x") == []
    live.until_awake()
    assert live.output("x") == [TOKEN] * 3
    assert live.logits(PROMPT) == before and live.weight_bytes() == size
    live.planner.check_invariants()
    live.pass_time()
    assert live.sleeping


def test_nobody_holds_the_memory_that_is_given_back(model: Path, tmp_path: Path) -> None:
    live = Idle(model, tmp_path)
    live.send(tokenized("x", PROMPT, 3))
    live.run()
    held = [weakref.ref(buffer) for buffer in live.updates.live.buffers.values()]
    live.pass_time()
    gc.collect()
    assert live.sleeping and [buffer() for buffer in held] == [None] * len(held)


def test_without_the_flag_and_before_its_time_nothing_is_given_back(model: Path, tmp_path: Path) -> None:
    live = Idle(model, tmp_path)
    live.pass_time(AFTER_S - 1)
    live.send(tokenized("x", PROMPT, 3))
    live.run()
    live.pass_time(AFTER_S - 1)
    assert not live.sleeping
    never = Idle(model, tmp_path, sleep_when_idle_s=0.0)
    never.pass_time(1e9)
    assert not never.sleeping


def test_a_probe_does_not_wake_and_says_that_it_sleeps(model: Path, tmp_path: Path) -> None:
    live = Idle(model, tmp_path)
    live.pass_time()
    live.send(Probe(id="p"))
    live.step()
    [probe] = [message for message in live.outbox.messages if isinstance(message, Probe)]
    assert probe.counters["scheduler"]["sleeping"] == 1 and live.sleeping
    assert live.scheduler.state()["sleeping"] and not live.scheduler.state()["asleep"]


def test_a_command_wakes_and_is_carried_out_then(model: Path, tmp_path: Path) -> None:
    live = Idle(model, tmp_path)
    live.pass_time()
    new = checkpoints.version_model(tmp_path / "new", TOKEN + 1)
    assert live.call(UpdateWeightsFromDisk(model_path=str(new), weight_version="two")).success
    assert not live.sleeping
    live.pass_time()
    assert live.sleeping
    live.send(tokenized("x", PROMPT, 3))
    live.until_awake()
    assert live.by_version("x") == [("two", TOKEN + 1)] * 3


def test_memory_that_a_client_releases_meanwhile_is_the_clients_business(model: Path, tmp_path: Path) -> None:
    live = Idle(model, tmp_path, enable_memory_saver=True, enable_weights_cpu_backup=True)
    live.pass_time()
    assert live.call(ReleaseMemory()).body == {"asleep": True, "lacks": ["weights", "kv_cache"]}
    live.send(tokenized("x", PROMPT, 3))
    live.pass_time()
    live.pass_time()
    assert live.output("x") == [] and not live.sleeping
    live.call(ResumeMemory())
    live.run()
    assert live.output("x") == [TOKEN] * 3


@pytest.mark.parametrize("command", [PauseGeneration(mode="in_place"), BeginWeightUpdate()])
def test_nobody_sleeps_amid_what_a_trainer_does(
    model: Path, tmp_path: Path, command: PauseGeneration | BeginWeightUpdate
) -> None:
    live = Idle(model, tmp_path)
    assert live.call(command).success
    live.pass_time()
    assert not live.sleeping


def test_weights_that_cannot_be_read_again_stay(model: Path, tmp_path: Path) -> None:
    live = Idle(model, tmp_path)
    checkpoints.version_model(model, TOKEN + 5)  # a trainer rewrites the directory
    size = live.weight_bytes()
    live.pass_time()
    assert live.sleeping and live.weight_bytes() == size and not live.worker.cache.keys
    live.send(tokenized("x", PROMPT, 3))
    live.until_awake()
    assert live.output("x") == [TOKEN] * 3


def test_a_directory_that_is_rewritten_while_it_sleeps_is_served_under_another_version(
    model: Path, tmp_path: Path
) -> None:
    live = Idle(model, tmp_path)
    live.pass_time()
    checkpoints.version_model(model, TOKEN + 5)
    live.send(tokenized("x", PROMPT, 3))
    live.until_awake()
    assert live.by_version("x") == [("default-rewritten", TOKEN + 5)] * 3


def test_files_that_are_gone_are_tried_again_and_the_request_is_not_lost(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = Idle(model, tmp_path)
    live.pass_time()
    model.rename(tmp_path / "away")
    live.send(tokenized("x", PROMPT, 3))
    deadline = time.monotonic() + DEADLINE_S
    while "cannot take its memory again (1 of 12)" not in caplog.text:
        assert time.monotonic() < deadline
        live.step()
    assert live.sleeping and live.output("x") == []
    (tmp_path / "away").rename(model)
    live.pass_time(RETRY_S + 1)
    live.until_awake()
    assert live.output("x") == [TOKEN] * 3


def test_files_that_stay_away_end_the_process(model: Path, tmp_path: Path) -> None:
    live = Idle(model, tmp_path)
    live.pass_time()
    model.rename(tmp_path / "away")
    live.send(tokenized("x", PROMPT, 3))
    deadline = time.monotonic() + DEADLINE_S
    with pytest.raises(WakeFailed, match="weights"):
        for _ in range(10_000_000):
            assert time.monotonic() < deadline, MOST_TRIES
            live.now += 0.1
            live.step()


def test_a_request_that_is_aborted_in_its_sleep_ends_at_once(model: Path, tmp_path: Path) -> None:
    live = Idle(model, tmp_path)
    live.pass_time()
    live.send(tokenized("x", PROMPT, 3))
    live.step()
    live.outbox.frames.append(live.scheduler.abort("x"))
    assert live.finish("x") is not None
    live.until_awake()
