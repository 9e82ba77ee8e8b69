"""KV that left the pool comes back with the same bits: planner, worker and tier in one process, on a real model."""

import os
from array import array
from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.service import Boot
from quartet.scheduler_service.core.block_keys import digest
from quartet.scheduler_service.core.tier_acts import CarryOut, DropMemory
from quartet.scheduler_service.execution import kv_tier
from quartet.scheduler_service.execution.kv_blocks import KvBlocks
from quartet.scheduler_service.execution.kv_tier import tier_store
from quartet.scheduler_service.execution.rank_messages import OpenTier
from quartet.scheduler_service.execution.tier_part import OwnPart, own_part
from quartet.scheduler_service.host.block_files import BlockFiles
from quartet.scheduler_service.weights.update import Updates
from tests import checkpoints
from tests.engine import Engine, floats
from tests.model import tiny
from tests.tiered import BLOCK, OUTPUT_LOGPROBS, PAGE, PARAMS, PROMPTS, SIZES, Tiered


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.random_model(tmp_path_factory.mktemp("model"), 5)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3_5", tmp_path_factory.mktemp("hybrid"))


class Served(Tiered):
    """An engine with a tier."""

    def __init__(self, model: Path, rank: int = 0, **settings: Any) -> None:
        engine = Engine(model, **(SIZES | settings))
        super().__init__(engine, Updates(engine.worker.model.weights, engine.config, "/nowhere"), rank=rank)


def levels(tmp_path: Path) -> dict[str, dict[str, Any]]:
    memory = {"enable_hierarchical_cache": True, "hicache_ratio": 8.0}
    return {
        "files": {"kv_cache_dir": str(tmp_path)},
        "memory": memory,
        "both": {"kv_cache_dir": str(tmp_path), **memory},
    }


@pytest.mark.parametrize("level", ["files", "memory", "both"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_answers_are_those_of_a_server_that_computes_all(
    model: Path, tmp_path: Path, level: str, deterministic: bool
) -> None:
    alone = Engine(model, page_size=PAGE, enable_deterministic_inference=deterministic)
    computed = alone.generate([PROMPTS[0]], PARAMS, logprobs=OUTPUT_LOGPROBS)[0]
    served = Served(model, **levels(tmp_path)[level], enable_deterministic_inference=deterministic)
    first = served.ask(0)
    served.settle()
    served.ask(1)
    again = served.ask(0)
    assert first.cached_tokens == 0 and again.cached_tokens == 3 * BLOCK
    assert first.ids == again.ids == computed.ids
    assert again.logprobs is not None and computed.logprobs is not None
    assert floats(again.logprobs.values) == pytest.approx(floats(computed.logprobs.values), abs=1e-5)
    if deterministic:
        assert again.logprobs.values == computed.logprobs.values, "bit for bit"


@pytest.mark.parametrize("level", ["files", "memory", "both"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_recurrent_states_come_back_with_the_blocks(
    hybrid: Path, tmp_path: Path, level: str, deterministic: bool
) -> None:
    alone = Engine(hybrid, page_size=PAGE, enable_deterministic_inference=deterministic)
    computed = alone.generate([PROMPTS[0]], PARAMS, logprobs=OUTPUT_LOGPROBS)[0]
    settings = levels(tmp_path)[level] | {"hicache_ratio": 40.0 if level != "files" else None}
    served = Served(hybrid, **settings, enable_deterministic_inference=deterministic)
    assert served.tier.sizes.state_pieces > 0
    first = served.ask(0)
    served.settle()
    served.engine.planner.pool.clear()
    again = served.ask(0)
    assert first.cached_tokens == 0 and again.cached_tokens == 3 * BLOCK
    assert first.ids == again.ids == computed.ids
    assert again.logprobs is not None and computed.logprobs is not None
    assert floats(again.logprobs.values) == pytest.approx(floats(computed.logprobs.values), abs=1e-5)
    if deterministic:
        assert again.logprobs.values == computed.logprobs.values, "bit for bit"


def test_the_next_process_finds_recurrent_states_too(hybrid: Path, tmp_path: Path) -> None:
    served = Served(hybrid, kv_cache_dir=str(tmp_path))
    first = served.ask(0)
    served.settle()
    later = Served(hybrid, kv_cache_dir=str(tmp_path))
    again = later.ask(0)
    assert again.cached_tokens == 3 * BLOCK and again.ids == first.ids
    assert later.ask(1).cached_tokens == 0


def test_the_next_process_finds_them_again(model: Path, tmp_path: Path) -> None:
    served = Served(model, kv_cache_dir=str(tmp_path))
    first = served.ask(0)
    served.settle()
    later = Served(model, kv_cache_dir=str(tmp_path))
    assert len(later.tier.files) == 3
    again = later.ask(0)
    assert again.cached_tokens == 3 * BLOCK and again.ids == first.ids
    assert later.ask(0, extra_key="mine").cached_tokens == 0


@pytest.mark.parametrize("change", ["weights", "config", "dtype"])
def test_kv_of_something_else_is_never_used(model: Path, tmp_path: Path, change: str) -> None:
    kept = {"kv_cache_dir": str(tmp_path / "kv")}
    served = Served(model, **kept)
    served.ask(0)
    served.settle()
    seed, more = (6, {}) if change == "weights" else (5, {"rope_theta": 20000.0} if change == "config" else {})
    other = checkpoints.random_model(tmp_path / "other", seed, **more)
    changed = Served(other, **kept, dtype="bfloat16" if change == "dtype" else "float32")
    assert len(changed.tier.files) == 0
    assert changed.ask(0).cached_tokens == 0


def test_an_update_of_the_weights_drops_all(model: Path, tmp_path: Path) -> None:
    served = Served(model, kv_cache_dir=str(tmp_path / "kv"), enable_hierarchical_cache=True)
    served.ask(0)
    served.settle()
    other = checkpoints.random_model(tmp_path / "other", 6)
    staged = served.updates.from_disk(str(other), "auto", None)
    served.updates.swap(staged, "2")
    served.engine.planner.forget_prefixes()
    second = served.ask(0)
    assert second.cached_tokens == 0
    served.settle()
    served.engine.planner.pool.clear()
    assert served.ask(0).cached_tokens == 3 * BLOCK, "what the new weights have computed is kept"
    assert len(Served(model, kv_cache_dir=str(tmp_path / "kv")).tier.files) == 0, "but not for another process"


def test_a_flush_drops_all_but_not_the_identity(model: Path, tmp_path: Path) -> None:
    served = Served(model, kv_cache_dir=str(tmp_path))
    served.ask(0)
    served.settle()
    served.engine.planner.forget_prefixes()
    assert served.ask(0).cached_tokens == 0
    served.settle()
    assert len(Served(model, kv_cache_dir=str(tmp_path)).tier.files) == 3


@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_a_damaged_block_is_computed_again(model: Path, tmp_path: Path, damage: str) -> None:
    served = Served(model, kv_cache_dir=str(tmp_path))
    first = served.ask(0)
    served.settle()
    files = {bytes.fromhex(path.stem): path for path in tmp_path.glob("*/*.kv")}
    ids = array("i", PROMPTS[0][BLOCK : 2 * BLOCK]).tobytes()
    second = next(files[key] for key in (digest(key, ids) for key in files) if key in files)
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    {
        "byte": lambda: second.write_bytes(data),
        "cut": lambda: second.write_bytes(data[:500]),
        "gone": second.unlink,
    }[damage]()
    served.ask(1)
    again = served.ask(0)
    assert again.cached_tokens == BLOCK and again.ids == first.ids
    assert served.tier.damaged == 1
    served.settle()
    served.ask(1)
    assert served.ask(0).cached_tokens == 3 * BLOCK, "it was written anew"


def test_a_read_that_takes_too_long_is_given_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(model, kv_cache_dir=str(tmp_path))
    first = served.ask(0)
    served.settle()
    served.engine.planner.pool.clear()
    assert isinstance(served.store.part, OwnPart) and served.store.part._io is not None
    monkeypatch.setattr(served.store.part._io, "read", lambda number, keys: None)  # a disk that hangs
    rid = served.engine.add(PROMPTS[0], PARAMS)
    served.store.turn(0.0)
    assert not served.engine.step()
    served.store.turn(0.0)
    assert not served.engine.step() and served.store.holds_up
    served.store.turn(kv_tier.FETCH_S + 1.0)
    served.serve(lambda: served.engine.planner.idle)
    assert served.engine.answers[rid].ids == first.ids and served.engine.answers[rid].cached_tokens == 0
    assert "takes too long" in caplog.text and served.tier.given_up == 3


def test_memory_that_is_released_takes_no_block_with_it(model: Path, tmp_path: Path) -> None:
    served = Served(model, kv_cache_dir=str(tmp_path))
    first = served.ask(0)
    served.settle()
    served.engine.worker.cache.release()
    served.engine.planner.forget_prefixes(keep_tier=True)
    served.store.turn(0.0)
    served.engine.worker.cache.allocate()
    again = served.ask(0)
    assert again.cached_tokens == 3 * BLOCK and again.ids == first.ids


def test_blocks_of_a_pool_that_has_gone_are_not_stored(model: Path, tmp_path: Path) -> None:
    served = Served(model, kv_cache_dir=str(tmp_path))
    served.engine.add(PROMPTS[0], PARAMS)
    while served.engine.step():
        pass
    served.engine.worker.cache.release()
    served.store.turn(0.0)
    served.tier.check()
    assert len(served.tier.files) == 0 and served.tier.pending == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache_dir_size": 4096}, "--kv-cache-dir-size 4096 is less than one block of 64 tokens"),
        ({"enable_hierarchical_cache": True, "hicache_size": 10**6}, "no room for --enable-hierarchical-cache"),
    ],
)
def test_sizes_that_cannot_be_are_refused(model: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        Served(model, kv_cache_dir=str(tmp_path), **settings)


def test_the_bound_of_the_files_holds(model: Path, tmp_path: Path) -> None:
    size = 4 * (36 << 10)  # 2 layers, keys and values of 2 heads, 16 float32 numbers of 64 tokens, and a header
    served = Served(model, kv_cache_dir=str(tmp_path), kv_cache_dir_size=size + 100)
    assert served.tier.files.capacity == 4
    for number in range(4):
        served.ask(number)
        served.settle()
    assert len(served.tier.files) == 4
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.glob("*/*")) <= size


def test_blocks_are_whole_pages() -> None:
    assert [kv_tier.block_tokens(size) for size in (1, 16, 48, 64, 100)] == [64, 64, 48, 64, 100]


def test_no_flag_no_tier(model: Path) -> None:
    engine = Engine(model)
    boot = Boot(
        role="scheduler",
        run_dir="",
        inbox="",
        outbox="",
        config=engine.config,
        ready_fd=-1,
        lifeline_fd=-1,
        parent_pid=0,
    )
    updates = Updates(engine.worker.model.weights, engine.config, "/nowhere")
    assert tier_store(boot, engine.worker, updates, engine.planner) is None


def test_files_that_cannot_be_read_do_not_stop_a_start(model: Path, tmp_path: Path) -> None:
    served = Served(model, kv_cache_dir=str(tmp_path))
    served.ask(0)
    served.settle()
    for file in tmp_path.glob("*/*.kv"):
        file.write_bytes(b"hostile")
    assert len(Served(model, kv_cache_dir=str(tmp_path)).tier.files) == 0


def test_what_planning_asks_for_is_done_before_the_step(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is taken back while the next step is planned loses its pages to others of that step."""
    served = Served(model, enable_hierarchical_cache=True)
    part = served.store.part
    told: list[object] = []
    monkeypatch.setattr(part, "do", told.append)
    monkeypatch.setattr(served.engine.planner, "next", lambda now: served.tier.commands.append(DropMemory(b"k")))
    assert served.store.plan(0.0) is None
    assert told == [CarryOut([DropMemory(b"k")])] and not served.tier.commands


def test_blocks_of_former_ranks_that_cannot_be_deleted_end_the_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(files: BlockFiles, first: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(BlockFiles, "drop_ranks", fail)
    with pytest.raises(StartupError, match=r"--kv-cache-dir .* cannot be used: Permission denied"):
        Served(model, kv_cache_dir=str(tmp_path))


def test_the_first_rank_of_another_machine_deletes_what_former_ranks_have_left_there(
    model: Path, tmp_path: Path
) -> None:
    blocks = KvBlocks(Served(model, enable_hierarchical_cache=True).engine.worker.cache, 64, None)
    for rank in (2, 3, 4):
        used = BlockFiles(tmp_path / f"rank{rank}", 4)
        used.begin(digest(b"identity"))
        used.write(digest(b"key"), memoryview(b"data"))
        os.close(used._lock)
    opening = OpenTier(64, 0, 2, 4, str(tmp_path))
    own_part(opening, blocks, rank=3, leads_machine=False)
    assert len(list(tmp_path.rglob("*.kv"))) == 3
    own_part(opening, blocks, rank=2)
    assert [file.parent.parent.name for file in sorted(tmp_path.rglob("*.kv"))] == ["rank2", "rank3"]


def test_of_several_schedulers_the_first_deletes_what_former_ones_have_left(model: Path, tmp_path: Path) -> None:
    alone = Served(model, kv_cache_dir=str(tmp_path))
    alone.ask(0)
    alone.settle()
    for rank, left in ((1, 3), (0, 0)):  # both at once would find the lock of each other
        Served(model, rank, kv_cache_dir=str(tmp_path), dp_size=2)
        assert len(list(tmp_path.rglob("*.kv"))) == left


def test_without_memory_for_a_read_the_prompt_is_computed(model: Path, tmp_path: Path) -> None:
    served = Served(model, kv_cache_dir=str(tmp_path))
    first = served.ask(0)
    served.settle()
    served.ask(1)
    part = served.store.part
    assert isinstance(part, OwnPart) and part._files is not None
    part._files.block_bytes = 1 << 62
    again = served.ask(0)
    assert served.tier.restored == 0 and again.ids == first.ids


def test_another_number_of_schedulers_leaves_no_files_behind(model: Path, tmp_path: Path) -> None:
    for settings, place in (({}, ""), ({"dp_size": 2}, "scheduler"), ({}, "")):
        served = Served(model, kv_cache_dir=str(tmp_path), **settings)
        assert not list(tmp_path.rglob("*.kv")) and not served.tier.files
        served.ask(0)
        served.settle()
        found = list(tmp_path.rglob("*.kv"))
        assert found and {file.parent.parent for file in found} == {tmp_path / place}
