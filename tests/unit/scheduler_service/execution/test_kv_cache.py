"""The KV pool: where it lies, and what writing does to it."""

from pathlib import Path

import torch

from quartet.scheduler_service.execution.kv_cache import GB, KVCache, Placement, token_bytes, untouched_zeros
from quartet.scheduler_service.model.batch import AttentionSpec

CPU = torch.device("cpu")


def spec(layer: int, kv_heads: int = 2, dim: int = 4) -> AttentionSpec:
    return AttentionSpec(layer=layer, heads=4, kv_heads=kv_heads, head_dim=dim, scale=0.5)


def test_bytes_of_a_token_add_up_over_layers():
    assert token_bytes([spec(0), spec(1, kv_heads=1, dim=8)], torch.bfloat16) == 2 * (8 + 8) * 2


def test_layers_of_different_shape_have_their_own_pools():
    cache = KVCache([spec(0), spec(5, kv_heads=1, dim=8)], page_count=3, page_size=4, dtype=torch.float32, device=CPU)
    assert cache.keys[0].shape == (2, 16, 4) and cache.values[5].shape == (1, 16, 8)
    assert cache.gigabytes == (16 * 16 * 4 / GB,) * 2


def test_latent_vectors_are_kept_once():
    latent = AttentionSpec(layer=1, heads=4, kv_heads=1, head_dim=24, scale=0.5, values_are_keys=True)
    assert token_bytes([spec(0), latent], torch.bfloat16) == (2 * 8 + 24) * 2
    cache = KVCache([spec(0), latent], page_count=3, page_size=4, dtype=torch.float32, device=CPU)
    assert cache.values[1] is cache.keys[1] and cache.values[0] is not cache.keys[0]
    keys, values = cache.gigabytes
    assert (keys, values) == (16 * (8 + 24) * 4 / GB, 16 * 8 * 4 / GB)
    kept = torch.randn(2, 1, 24)
    cache.write(1, Placement(torch.tensor([5, 9])), kept, kept)
    assert torch.equal(cache.values[1][:, [5, 9]], kept.transpose(0, 1))
    cache.release()
    cache.allocate()
    assert cache.values[1] is cache.keys[1]


def test_tokens_are_written_to_their_slots_and_nowhere_else():
    cache = KVCache([spec(0)], page_count=3, page_size=4, dtype=torch.float32, device=CPU)
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    slots = torch.tensor([5, 12, 6])
    cache.write(0, Placement(slots), k, v)
    assert torch.equal(cache.keys[0][:, slots], k.transpose(0, 1))
    assert torch.equal(cache.values[0][:, slots], v.transpose(0, 1))
    rest = [i for i in range(16) if i not in slots]
    assert not cache.keys[0][:, rest].any() and not cache.values[0][:, rest].any()


def test_a_page_that_is_begun_loses_what_an_earlier_owner_left():
    cache = KVCache([spec(0)], page_count=3, page_size=4, dtype=torch.float32, device=CPU)
    cache.keys[0].fill_(torch.nan)
    cache.write(0, Placement(torch.tensor([8]), begun=torch.tensor([2])), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    page = cache.keys[0][:, 8:12]
    assert (page[:, 0] == 1).all() and (page[:, 1:] == 0).all()
    assert cache.keys[0][:, 4:8].isnan().all()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_pool_takes_memory_only_where_it_is_written_and_gives_all_of_it_back():
    before, size = resident_bytes(), 256 << 20
    pool = untouched_zeros((1, size // 256, 64), torch.float32, CPU)
    assert not pool[:, ::4096].any() and resident_bytes() - before < size // 8
    pool.fill_(1)
    assert resident_bytes() - before > size * 0.9
    del pool
    assert resident_bytes() - before < size // 8


def test_a_pool_of_nothing_is_no_error():
    assert untouched_zeros((0, 16, 4), torch.float32, CPU).shape == (0, 16, 4)
