"""A rank other than 0: what its messages do to work in the background."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.runtime.control import InitWeightsUpdateGroup
from quartet.scheduler_service.execution.rank_messages import Answer, DropSecond, GiveUp, JoinGroup
from quartet.scheduler_service.execution.rank_updates import FollowingUpdates
from quartet.scheduler_service.follower import Follower
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.weights import distributed
from quartet.scheduler_service.weights.update import Updates
from tests import checkpoints
from tests.configs import resolved
from tests.unit.scheduler_service.execution.test_rank_updates import Scripted

PATIENCE_S = 120.0
JOIN = JoinGroup(
    InitWeightsUpdateGroup(
        id="", master_address="127.0.0.1", master_port=1, rank_offset=1, world_size=3, group_name="g", backend="gloo"
    )
)


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
    follower.handle(JOIN)
    follower.work_on()
    assert waits.wait(PATIENCE_S)
    follower.updates.updates.open_session()
    follower.handle(GiveUp())
    follower.handle(DropSecond())
    assert follower.updates.updates.session is None and channel.heard == []
    trainer.set()
    ends_at = time.monotonic() + PATIENCE_S
    while not channel.heard and time.monotonic() < ends_at:
        follower.work_on()
    assert channel.heard == [Answer(of_meeting=True)] and list(follower.updates.updates.groups) == ["g"]
