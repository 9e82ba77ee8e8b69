"""State that a restarted scheduler takes over from the previous one."""

from pathlib import Path

import pytest

from quartet.runtime.control import (
    BeginWeightUpdate,
    ContinueGeneration,
    EndWeightUpdate,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
)
from quartet.scheduler_service.control.durable_state import LOST, DurableState
from tests import checkpoints
from tests.live import Live


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.version_model(tmp_path / "model", 100)


def started(model: Path, run_dir: Path) -> Live:
    """A scheduler with the state of the previous one."""
    live = Live(model, run_dir, enable_memory_saver=True)
    live.scheduler.durable_state = DurableState(str(run_dir))
    live.scheduler.durable_state.restore(live.scheduler)
    return live


def test_a_pause_survives_restarts_until_generation_continues(model: Path, tmp_path: Path) -> None:
    first = started(model, tmp_path)
    assert not first.scheduler.planner.paused
    first.call(PauseGeneration(mode="in_place"))
    second = started(model, tmp_path)
    assert second.scheduler.planner.paused
    second.call(ContinueGeneration())
    assert not started(model, tmp_path).scheduler.planner.paused


def test_released_memory_is_released_again(model: Path, tmp_path: Path) -> None:
    started(model, tmp_path).call(ReleaseMemory(tags=["kv_cache"]))
    again = started(model, tmp_path).scheduler
    assert again.saver is not None and again.saver.released == {"kv_cache"}
    assert again.planner.asleep


def test_released_graphs_do_not_keep_a_restarted_scheduler_from_computing(model: Path, tmp_path: Path) -> None:
    live = started(model, tmp_path)
    live.call(ReleaseMemory())
    live.call(ResumeMemory(tags=["weights"]))
    live.call(ResumeMemory(tags=["kv_cache"]))
    assert not started(model, tmp_path).planner.asleep


def test_an_update_session_of_the_previous_scheduler_cannot_be_completed(model: Path, tmp_path: Path) -> None:
    assert started(model, tmp_path).call(BeginWeightUpdate()).success
    again = started(model, tmp_path)
    refused = again.call(EndWeightUpdate())
    assert not refused.success and LOST in refused.message
    assert started(model, tmp_path).call(BeginWeightUpdate()).success


def test_state_that_cannot_be_written_is_logged_as_an_error_and_the_command_succeeds(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = started(model, tmp_path)
    live.scheduler.durable_state = DurableState(str(tmp_path / "gone"))
    assert live.call(PauseGeneration(mode="in_place")).success
    assert "Could not record a pause" in caplog.text
