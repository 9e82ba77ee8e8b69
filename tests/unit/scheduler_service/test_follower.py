"""A rank other than 0: what its messages do to work in the background."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.runtime.control import InitWeightsUpdateGroup
from quartet.scheduler_service.execution.rank_messages import Answer, DropSecond, GiveUp, JoinGroup, Meet
from quartet.scheduler_service.execution.rank_updates import FollowingUpdates
from quartet.scheduler_service.follower import Follower
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.weights import distributed
from quartet.scheduler_service.weights.update import Updates
from tests import checkpoints
from tests.configs import resolved
from tests.unit.scheduler_service.execution.test_rank_updates import Scripted

PATIENCE_S = 120.0


def joining(number: int, name: str) -> Meet:
    command = InitWeightsUpdateGroup(
        id="", master_address="127.0.0.1", master_port=1, rank_offset=1, world_size=3, group_name=name, backend="gloo"
    )
    return Meet(number, JoinGroup(command))


@pytest.fixture
def channel() -> Scripted:
    return Scripted()


@pytest.fixture
def follower(tmp_path: Path, channel: Scripted) -> Follower:
    directory = checkpoints.version_model(tmp_path, 5)
    config = resolved(model_path=str(directory), model_dir=str(directory))
    updates = FollowingUpdates(Updates(checkpoints.loaded(directory), config, str(tmp_path)))
    model: Any = None  # no step runs
    return Follower(model, torch.device("cpu"), channel, Parallel(1, 2), updates)


def test_a_rank_that_waits_for_a_trainer_does_what_is_told_meanwhile(
    follower: Follower, channel: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, trainer = threading.Event(), threading.Event()

    def join(spec: distributed.GroupSpec) -> str:
        waits.set()
        assert trainer.wait(PATIENCE_S)
        return "group"

    monkeypatch.setattr(distributed, "join", join)
    follower.handle(joining(3, "g"))
    follower.work_on()
    assert waits.wait(PATIENCE_S)
    follower.updates.updates.open_session()
    follower.handle(GiveUp())
    follower.handle(DropSecond())
    assert follower.updates.updates.session is None and channel.heard == []
    trainer.set()
    work_until(follower, channel, 1)
    assert channel.heard == [Answer(meeting=3)] and list(follower.updates.updates.groups) == ["g"]


def test_a_rank_meets_a_trainer_that_comes_while_it_waits_for_another(
    follower: Follower, channel: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = {"absent": threading.Event(), "there": threading.Event()}

    def join(spec: distributed.GroupSpec) -> str:
        assert trainers[spec.name].wait(PATIENCE_S)
        return spec.name

    monkeypatch.setattr(distributed, "join", join)
    follower.handle(joining(0, "absent"))
    follower.work_on()
    follower.handle(joining(1, "there"))
    trainers["there"].set()
    work_until(follower, channel, 1)
    assert channel.heard == [Answer(meeting=1)] and list(follower.updates.updates.groups) == ["there"]
    trainers["absent"].set()
    work_until(follower, channel, 2)
    assert channel.heard == [Answer(meeting=1), Answer(meeting=0)] and not follower.meetings


class Busy(Scripted):
    """Always has something to receive, until it was told enough."""

    def __init__(self, first: Meet, enough: Callable[[], bool]) -> None:
        super().__init__()
        self.first: list[Meet] = [first]
        self.enough = enough
        self.most = 1_000_000  # messages; far more than it takes

    def waits(self, timeout_s: float) -> bool:
        return True

    def receive(self) -> Any:
        self.most -= 1
        if self.first:
            return self.first.pop()
        return None if self.enough() or not self.most else DropSecond()


def test_a_rank_that_always_has_something_to_do_meets_a_trainer_nevertheless(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "join", lambda spec: spec.name)
    busy = Busy(joining(7, "g"), lambda: bool(busy.heard))
    follower.channel = busy
    follower.run()
    assert busy.heard == [Answer(meeting=7)]


def work_until(follower: Follower, channel: Scripted, answers: int) -> None:
    """Let the rank work until it has given so many answers."""
    ends_at = time.monotonic() + PATIENCE_S
    while len(channel.heard) < answers and time.monotonic() < ends_at:
        follower.work_on()
