import pytest
import torch

from quartet.scheduler_service.execution.kv_blocks import KvBlocks, MemoryBlocks
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.state_cache import StateCache
from quartet.scheduler_service.model.batch import AttentionSpec
from quartet.scheduler_service.model.state_access import StateSpec

PAGE, BLOCK = 4, 8
CPU = torch.device("cpu")


def filled(dtype: torch.dtype, shared: bool = False) -> KVCache:
    """Twelve pages in two layers of different shapes, every value its own."""
    layers = [
        AttentionSpec(layer=0, heads=4, kv_heads=2, head_dim=4, scale=1.0),
        AttentionSpec(layer=3, heads=4, kv_heads=1, head_dim=6, scale=1.0, values_are_keys=shared),
    ]
    cache = KVCache(layers, 12, PAGE, dtype, CPU)
    for pools in (cache.keys, cache.values):
        for pool in pools.values():
            pool.copy_(torch.randn(pool.shape))
    return cache


def tokens(cache: KVCache, pages: list[int]) -> list[torch.Tensor]:
    """What lies in pages, by pool."""
    slots = [page * PAGE + offset for page in pages for offset in range(PAGE)]
    return [pool[:, slots] for pools in (cache.keys, cache.values) for pool in pools.values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_blocks_lie_in_other_pages_bit_for_bit(dtype: torch.dtype, shared: bool) -> None:
    cache, other = filled(dtype, shared), filled(dtype, shared)
    blocks = KvBlocks(cache, BLOCK)
    pages, theirs = [3, 4, 9, 2, 7, 8], [1, 2, 3, 12, 11, 5]
    rows = blocks.gather(pages)
    per_token = (2 * 2 * 4 + (1 if shared else 2) * 6) * dtype.itemsize
    assert rows.shape == (3, blocks.block_bytes) and blocks.block_bytes == per_token * BLOCK
    KvBlocks(other, BLOCK).scatter(rows, 0, theirs)
    assert same(tokens(cache, pages), tokens(other, theirs))


@pytest.mark.parametrize("skipped", range(6))
def test_pages_that_are_there_are_skipped(skipped: int) -> None:
    cache, other = filled(torch.float32), filled(torch.float32)
    pages, theirs = [3, 4, 9, 2, 7, 8], [1, 2, 3, 12, 11, 5]
    rows = KvBlocks(cache, BLOCK).gather(pages)
    before = tokens(other, theirs[:skipped])
    for end in range(skipped + 1, 7):
        KvBlocks(other, BLOCK).scatter(rows, skipped, theirs[skipped:end])
        assert same(tokens(cache, pages[skipped:end]), tokens(other, theirs[skipped:end]))
    assert same(tokens(other, theirs[:skipped]), before)


def test_the_layout_says_all_that_bytes_follow_from() -> None:
    layouts = [
        KvBlocks(filled(torch.float32), BLOCK).layout,
        KvBlocks(filled(torch.bfloat16), BLOCK).layout,
        KvBlocks(filled(torch.float32, shared=True), BLOCK).layout,
        KvBlocks(filled(torch.float32), 16).layout,
    ]
    assert len(set(layouts)) == 4


def test_a_pool_without_memory_is_noticed() -> None:
    cache = filled(torch.float32)
    blocks = KvBlocks(cache, BLOCK)
    cache.release()
    assert not blocks.is_there
    cache.allocate()
    assert blocks.is_there and blocks.gather([1, 2]).count_nonzero() == 0


def test_blocks_in_memory_take_the_place_of_dropped_ones() -> None:
    memory = MemoryBlocks(2, 3, CPU)
    rows = [torch.full((3,), value, dtype=torch.uint8) for value in range(4)]
    memory.put(b"0", rows[0])
    memory.put(b"1", rows[1])
    memory.drop(b"0")
    memory.drop(b"0")
    memory.put(b"2", rows[2])
    assert b"0" not in memory and torch.equal(memory.get(b"1"), rows[1]) and torch.equal(memory.get(b"2"), rows[2])
    memory.clear()
    memory.put(b"3", rows[3])
    assert torch.equal(memory.get(b"3"), rows[3])


def test_a_recurrent_state_comes_back_bit_for_bit() -> None:
    dtypes = (torch.float32, torch.bfloat16)
    specs = [StateSpec(1, ((2, 5, 3), (7,)), dtypes), StateSpec(2, ((101,), (3, 3)), dtypes[::-1])]
    states = StateCache(specs, 1, 2, CPU)
    for pools in states.pools.values():
        for pool in pools:
            pool.copy_(torch.randn(pool.shape))
    blocks = KvBlocks(filled(torch.float32), BLOCK, states)
    size = sum(spec.nbytes for spec in specs)
    rows = blocks.gather_state(0)
    assert (
        rows.shape == (-(-size // blocks.block_bytes), blocks.block_bytes) == (blocks.state_pieces, blocks.block_bytes)
    )
    assert not same(list(states.snapshot(0)), list(states.snapshot(1)))
    blocks.scatter_state(rows, 1)
    assert same(list(states.snapshot(0)), list(states.snapshot(1)))
    assert blocks.layout != KvBlocks(filled(torch.float32), BLOCK).layout
