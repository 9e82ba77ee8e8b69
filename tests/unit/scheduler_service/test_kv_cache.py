"""The KV pool: its size, and what writing does to it."""

import pytest
import torch

from runtime.config import ServerConfig
from runtime.errors import StartupError
from scheduler_service.kv_cache import GB, KVCache, Placement, choose_page_count, token_bytes
from scheduler_service.model.batch import AttentionSpec

CPU = torch.device("cpu")


def spec(layer: int, kv_heads: int = 2, dim: int = 4) -> AttentionSpec:
    return AttentionSpec(layer=layer, heads=4, kv_heads=kv_heads, head_dim=dim, scale=0.5)


def count(free_gb: float = 10.0, most_tokens: int = 10**9, bytes_per_token: int = 1 << 10, **settings) -> int:
    config = ServerConfig(device="cpu", **settings)
    return choose_page_count(config, 16, bytes_per_token, most_tokens, int(free_gb * GB), 16 * GB)


def test_the_default_is_a_share_of_what_is_free():
    assert count(10.0) * 16 * 1024 == pytest.approx(4.0 * GB, rel=1e-3)


def test_no_more_than_all_requests_can_hold():
    assert count(most_tokens=1000) == 63


def test_the_memory_share_counts_what_is_taken_already():
    assert count(10.0, mem_fraction_static=0.5) * 16 * 1024 == pytest.approx(2.0 * GB, rel=1e-3)


def test_an_explicit_size_is_rounded_down_to_whole_pages():
    assert count(max_total_tokens=1000) == 62


def test_an_explicit_size_that_does_not_fit_is_cut_to_what_does():
    assert count(1.0, max_total_tokens=10**9) * 16 * 1024 < GB


@pytest.mark.parametrize("settings", [{"max_total_tokens": 15}, {"mem_fraction_static": 0.1}])
def test_no_room_for_one_page_is_an_error_that_names_the_flag(settings):
    with pytest.raises(StartupError, match=next(iter(settings)).replace("_", "-")):
        count(**settings)


def test_bytes_of_a_token_add_up_over_layers():
    assert token_bytes([spec(0), spec(1, kv_heads=1, dim=8)], torch.bfloat16) == 2 * (8 + 8) * 2


def test_layers_of_different_shape_have_their_own_pools():
    cache = KVCache([spec(0), spec(5, kv_heads=1, dim=8)], page_count=3, page_size=4, dtype=torch.float32, device=CPU)
    assert cache.keys[0].shape == (2, 16, 4) and cache.values[5].shape == (1, 16, 8)
    assert cache.gigabytes == (16 * 16 * 4 / GB,) * 2


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
