"""What a scheduler that is started again still knows of the one before."""

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
    """A scheduler that follows the orders of the one before."""
    live = Live(model, run_dir, enable_memory_saver=True)
    live.scheduler.durable_state = DurableState(str(run_dir))
    live.scheduler.durable_state.restore(live.scheduler)
    return live


def test_a_pause_stands_until_it_is_taken_back(model: Path, tmp_path: Path) -> None:
    first = started(model, tmp_path)
    assert not first.scheduler.planner.paused
    first.call(PauseGeneration(mode="in_place"))
    second = started(model, tmp_path)
    assert second.scheduler.planner.paused
    second.call(ContinueGeneration())
    assert not started(model, tmp_path).scheduler.planner.paused


def test_memory_that_was_given_up_is_given_up_again(model: Path, tmp_path: Path) -> None:
    started(model, tmp_path).call(ReleaseMemory(tags=["kv_cache"]))
    again = started(model, tmp_path).scheduler
    assert again.saver is not None and again.saver.released == {"kv_cache"}
    assert again.planner.asleep


def test_graphs_that_were_given_up_keep_no_later_scheduler_asleep(model: Path, tmp_path: Path) -> None:
    live = started(model, tmp_path)
    live.call(ReleaseMemory())
    live.call(ResumeMemory(tags=["weights"]))
    live.call(ResumeMemory(tags=["kv_cache"]))
    assert not started(model, tmp_path).planner.asleep


def test_an_update_that_had_begun_cannot_be_ended_without_its_first_half(model: Path, tmp_path: Path) -> None:
    assert started(model, tmp_path).call(BeginWeightUpdate()).success
    again = started(model, tmp_path)
    refused = again.call(EndWeightUpdate())
    assert not refused.success and LOST in refused.message
    assert started(model, tmp_path).call(BeginWeightUpdate()).success


def test_a_record_that_cannot_be_written_is_an_error_in_the_log_and_no_more(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = started(model, tmp_path)
    live.scheduler.durable_state = DurableState(str(tmp_path / "gone"))
    assert live.call(PauseGeneration(mode="in_place")).success
    assert "Could not record a pause" in caplog.text
