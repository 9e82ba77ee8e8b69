"""All ranks have the same adapters in memory: rank 0 against another that answers what the test wants."""

from pathlib import Path

import pytest
import torch

from quartet.runtime.model_files import model_info
from quartet.scheduler_service.execution.rank_adapters import FollowingAdapters, LeadingAdapters, content_of
from quartet.scheduler_service.execution.rank_messages import Answer, DropAdapter, ReadAdapter, TakeAdapter
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.registry import load_model
from quartet.scheduler_service.weights.adapters import adapter_identity
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from tests import checkpoints
from tests.adapters import write_adapter
from tests.configs import resolved
from tests.unit.scheduler_service.execution.test_rank_updates import Scripted

CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoints.version_model(tmp_path / "base", 5)


@pytest.fixture
def model(base: Path) -> Decoder:
    config = resolved(model_path=str(base))
    found = load_model(config, model_info.load(config), CPU)
    assert isinstance(found, Decoder)
    return found


@pytest.fixture
def other() -> Scripted:
    return Scripted()


@pytest.fixture
def store(model: Decoder, base: Path, other: Scripted, tmp_path: Path) -> LeadingAdapters:
    config = resolved(model_path=str(base), enable_lora=True)
    return LeadingAdapters(model, config, str(tmp_path), Followers(Parallel(0, 2), [other]))


def test_the_others_take_and_drop_what_rank_0_does(
    store: LeadingAdapters, base: Path, other: Scripted, tmp_path: Path
) -> None:
    place = write_adapter(base, tmp_path / "a")
    other.script = [Answer(content_of(adapter_identity(place)))] * 2
    first, second = store.read(place), store.read(place)
    store.install("a", "a", str(place), first, pinned=False)
    store.install("a", "a", str(place), second, pinned=False)
    store.evict("a")
    assert other.heard == [
        ReadAdapter(str(place), 1, []),
        ReadAdapter(str(place), 2, [1]),
        TakeAdapter("a", 1),
        DropAdapter("a"),
        TakeAdapter("a", 2),
        DropAdapter("a"),
    ]


def test_another_file_under_the_same_path_is_refused(
    store: LeadingAdapters, base: Path, other: Scripted, tmp_path: Path
) -> None:
    place = write_adapter(base, tmp_path / "a")
    other.script = [Answer([1, 2]), Answer(refusal="not there")]
    with pytest.raises(CheckpointError, match="is not the same file for rank 1 as for rank 0"):
        store.read(place)
    with pytest.raises(CheckpointError, match=r"not there \(rank 1\)"):
        store.read(place)


def test_what_was_read_and_not_taken_goes_with_the_next(model: Decoder, base: Path, tmp_path: Path) -> None:
    place = write_adapter(base, tmp_path / "a")
    adapters = FollowingAdapters(model, resolved(model_path=str(base), enable_lora=True))
    for task in (ReadAdapter(str(place), 1, []), ReadAdapter(str(place), 2, [1]), ReadAdapter(str(place), 3, [2])):
        assert adapters.do(task).value == content_of(adapter_identity(place))
    adapters.take("a", 2)
    assert list(adapters.loaded) == ["a"]
    with pytest.raises(KeyError):
        adapters.take("b", 1)
    assert "has neither" in adapters.do(ReadAdapter(str(tmp_path), 4, [])).refusal
