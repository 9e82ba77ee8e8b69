"""Weights that all schedulers exchange, or none: what one of them does until it hears the decision."""

from pathlib import Path

import pytest

from quartet.runtime.control import DecideChange, UpdateWeightsFromDisk
from quartet.runtime.messages import Prepared
from tests import checkpoints
from tests.live import Live

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
    for _ in range(10_000):
        if said(live):
            break
        live.step()
    live.step(STEPS)
    assert live.reply(id) is None
    assert live.worker.weight_version == "A"
    return id


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


def test_a_change_that_not_all_make_is_refused_and_leaves_what_serves(live: Live, tmp_path: Path) -> None:
    id = begun(live, tmp_path)
    live.send(DecideChange(change=id, reason="another one is broken"))
    reply = live.wait(id)
    assert (reply.success, reply.status, reply.message) == (False, 503, "another one is broken")
    assert live.worker.weight_version == "A"
    assert live.call(UpdateWeightsFromDisk(model_path=str(tmp_path / "b"), weight_version="B")).success
