"""A device that is almost full: what does not fit goes another way, and nothing is lost."""

from pathlib import Path

import pytest

from quartet.runtime.control import ReleaseMemory, ResumeMemory, UpdateWeightsFromDisk
from tests import checkpoints
from tests.live import Live
from tests.simulated_gpu import memory
from tests.simulated_gpu.memory import Memory
from tests.stepper import tokenized

PROMPT = list(range(10, 31))
FIRST, SECOND = 100, 200  # what the version models answer


@pytest.fixture
def served(tmp_path: Path) -> Live:
    directory = checkpoints.version_model(tmp_path / "first", FIRST)
    return Live(directory, tmp_path, depth=1, device="cuda", max_running_requests=2, enable_memory_saver=True)


def fill(monkeypatch: pytest.MonkeyPatch, spare_bytes: int) -> None:
    """Leave so much free."""
    monkeypatch.setattr(memory, "TOTAL_BYTES", Memory.used_bytes + spare_bytes)


def test_an_update_is_staged_on_the_host_where_the_device_has_no_room(served, tmp_path, monkeypatch, caplog):
    served.send(tokenized("x", PROMPT, 100, ignore_eos=True))
    served.step(4)
    fill(monkeypatch, served.updates.live.nbytes() // 2)
    directory = checkpoints.version_model(tmp_path / "second", SECOND)
    assert served.call(UpdateWeightsFromDisk(model_path=str(directory))).success
    served.run()
    assert "it is kept on the host" in caplog.text
    assert served.updates.second.device.type == "cpu"
    assert served.output("x")[0] == FIRST and served.output("x")[-1] == SECOND


def test_memory_that_somebody_else_has_taken_can_be_asked_for_again(served, tmp_path, monkeypatch):
    served.call(ReleaseMemory())
    fill(monkeypatch, served.updates.live.nbytes() // 2)
    reply = served.call(ResumeMemory())
    assert reply.status == 503 and "out of memory" in reply.message
    monkeypatch.undo()
    assert served.call(ResumeMemory()).success
    directory = checkpoints.version_model(tmp_path / "second", SECOND)
    assert served.call(UpdateWeightsFromDisk(model_path=str(directory))).success
    served.send(tokenized("x", PROMPT, 3))
    served.run()
    assert served.output("x") == [SECOND] * 3
