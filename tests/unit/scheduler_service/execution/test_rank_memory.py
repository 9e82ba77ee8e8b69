"""All ranks give memory back and take it again, or none does: rank 0 against another whose answers are known."""

from pathlib import Path

import pytest
import torch

from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.rank_memory import FollowingMemory, LeadingSaver
from quartet.scheduler_service.execution.rank_messages import Answer, GiveUp, Release, Resume
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.batch import AttentionSpec
from quartet.scheduler_service.weights.update import Updates
from tests import checkpoints
from tests.configs import resolved
from tests.unit.scheduler_service.execution.test_rank_updates import HEAD, Scripted

TAGS = ["cuda_graph", "kv_cache", "weights"]


@pytest.fixture
def cache() -> KVCache:
    return KVCache([AttentionSpec(0, 1, 1, 16, 1.0)], 4, 4, torch.float32, torch.device("cpu"))


@pytest.fixture
def updates(tmp_path: Path) -> Updates:
    directory = checkpoints.version_model(tmp_path, 5)
    config = resolved(model_path=str(directory), model_dir=str(directory))
    return Updates(checkpoints.loaded(directory), config, str(tmp_path))


@pytest.fixture
def other() -> Scripted:
    return Scripted()


@pytest.fixture
def saver(updates: Updates, cache: KVCache, other: Scripted) -> LeadingSaver:
    return LeadingSaver(updates, cache, True, Followers(Parallel(0, 2), [other]))


def test_the_others_hear_of_both(saver: LeadingSaver, other: Scripted, cache: KVCache) -> None:
    other.script = [Answer(), Answer()]
    saver.release(None)
    assert not cache.keys and saver.lacks == ["weights", "kv_cache"]
    saver.resume(["weights", "kv_cache"])
    assert cache.keys and saver.released == {"cuda_graph"}
    assert other.heard == [Release(TAGS, True), Resume(["kv_cache", "weights"], True)]


def test_an_unknown_tag_reaches_nobody(saver: LeadingSaver, other: Scripted) -> None:
    with pytest.raises(CommandRefused, match="The tag pool is unknown"):
        saver.release(["pool"])
    assert other.heard == []


def test_when_one_has_no_room_all_give_back_what_they_took(
    saver: LeadingSaver, other: Scripted, cache: KVCache
) -> None:
    other.script = [Answer(), Answer(refusal="no room", status=503), Answer()]
    saver.release(["kv_cache"])
    with pytest.raises(CommandRefused, match=r"no room \(rank 1\)") as refused:
        saver.resume(["kv_cache"])
    assert refused.value.status == 503
    assert saver.holds_kv_cache and not cache.keys and other.heard[-1] == Release(["kv_cache"], True)


def test_another_rank_keeps_its_weights_where_it_is_asked_to(updates: Updates, cache: KVCache) -> None:
    memory, before = FollowingMemory(updates, cache), updates.live.view(HEAD).clone()
    assert not memory.do(Release(TAGS, True)).refusal and not cache.keys
    assert updates.live.buffers["lm_head"].untyped_storage().nbytes() < 64
    assert not memory.do(Resume(TAGS, True)).refusal and cache.keys
    assert torch.equal(updates.live.view(HEAD), before)


def test_memory_waits_for_ranks_that_are_asked_something_else(saver: LeadingSaver, other: Scripted) -> None:
    other.script = [Answer()]
    asked: list[bool] = []
    saver._followers.together(GiveUp(), lambda: asked.append(saver.must_wait))
    assert asked == [True] and not saver.must_wait
