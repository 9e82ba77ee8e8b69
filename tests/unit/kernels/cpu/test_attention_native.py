"""Paged attention by our own kernel against the float64 reference, and the bits of a query in any company."""

import random

import pytest
import torch

from quartet.kernels.cpu.attention import paged_attention_reference
from quartet.kernels.cpu.attention_native import can_attend, paged_attention_native
from quartet.kernels.cpu.attention_schedule import Ragged, Run, page_list

pytestmark = pytest.mark.skipif(not can_attend(torch.bfloat16, 64), reason="no attention kernel on this machine")

PAGES = 300
TOLERANCE = 2e-2  # of results around 1: weights are rounded to bfloat16 before they meet the values


def scattered(rng: random.Random, count: int) -> list[Run]:
    return [(page, 1) for page in rng.sample(range(1, PAGES), count)]


def together(rng: random.Random, count: int) -> list[Run]:
    return [(rng.randrange(1, PAGES - count), count)]


def mixed(placement, page_size: int) -> Ragged:
    """Decode rows of short and long contexts, then chunks at the start and in the middle of prompts."""
    rng = random.Random(0)
    queries = [1] * 8 + [5, 40, 3, 150, 290]
    contexts = [1, 2, 30, 31, 32, 128, 129, 333, 5, 70, 120, 190, 290]
    return Ragged(queries, contexts, [placement(rng, -(-length // page_size)) for length in contexts], page_size)


def pools(kv_heads: int, dim: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (torch.randn(kv_heads, PAGES * page_size, dim).bfloat16() for _ in range(2))
    return k, v


def check(ragged: Ragged, heads: int, kv_heads: int, dim: int, **options) -> None:
    q = torch.randn(sum(ragged.query_lengths), heads, dim).bfloat16()
    k, v = pools(kv_heads, dim, ragged.page_size)
    options.setdefault("scale", dim**-0.5)
    result = paged_attention_native(ragged, q, k, v, **options)
    expected = paged_attention_reference(ragged, q, k, v, **options)
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("page_size", [1, 4, 16, 48])
@pytest.mark.parametrize("placement", [scattered, together])
def test_mixed_batch_agrees_with_reference(placement, page_size):
    if page_size == 1:
        ragged = Ragged([1, 7], [70, 33], [placement(random.Random(1), 70), placement(random.Random(2), 33)], 1)
    else:
        ragged = mixed(placement, page_size)
    check(ragged, 14, 2, 64)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (32, 1, 96), (6, 2, 128), (4, 1, 256)])
def test_heads_of_other_sizes_agree_with_reference(heads, kv_heads, dim):
    check(mixed(scattered, 16), heads, kv_heads, dim)


@pytest.mark.parametrize(
    "options",
    [{"window": 8}, {"window": 200}, {"softcap": 5.0}, {"softcap": 5.0, "window": 33}, {"scale": 0.5}],
    ids=str,
)
def test_options_agree_with_reference(options):
    check(mixed(scattered, 16), 6, 2, 64, **options)


def test_what_the_kernel_does_not_know_is_computed_by_torch():
    check(mixed(together, 16), 6, 2, 64, sinks=torch.linspace(-2, 2, 6))


def test_bidirectional_attention_agrees_with_reference():
    contexts = [7, 64, 150, 290]
    rng = random.Random(1)
    check(Ragged(list(contexts), contexts, [scattered(rng, -(-n // 4)) for n in contexts], 4), 6, 2, 64, causal=False)


def test_a_query_has_the_same_bits_in_any_chunk_company_and_place():
    rng, length = random.Random(4), 290
    k, v = pools(2, 64, 16)
    runs = scattered(rng, -(-length // 16))
    q = torch.randn(length, 14, 64).bfloat16()
    whole = paged_attention_native(Ragged([length], [length], [runs], 16), q, k, v, scale=0.125)
    moved_k, moved_v = k.clone(), v.clone()
    for place, page in enumerate(page_list(runs, 0, 99)):
        for pool, moved in ((k, moved_k), (v, moved_v)):
            moved[:, (200 + place) * 16 :][:, :16] = pool[:, page * 16 :][:, :16]
    for first, last in ((0, 1), (0, 17), (40, 130), (127, 129), (289, 290)):
        own, end = q[first:last], [(200, 19)]
        alone = Ragged([last - first], [last], [end], 16)
        assert torch.equal(paged_attention_native(alone, own, moved_k, moved_v, scale=0.125), whole[first:last])
        others = Ragged([1, last - first, 3], [80, last, 20], [end, runs, end], 16)
        result = paged_attention_native(others, torch.cat((q[:1], own, q[:3])), k, v, scale=0.125)
        assert torch.equal(result[1 : 1 + last - first], whole[first:last])


def test_numbers_behind_a_context_reach_nobody():
    k, v = pools(1, 64, 16)
    ragged = Ragged([1, 5], [3, 37], [[(1, 1)], [(4, 1), (9, 2)]], 16)
    q = torch.randn(6, 2, 64).bfloat16()
    expected = paged_attention_native(ragged, q, k, v, scale=1.0)
    for pool in (k, v):
        pool[:, 16 + 3 : 32] = torch.nan
        pool[:, 10 * 16 + 5 : 11 * 16] = torch.inf
    ragged = Ragged(ragged.query_lengths, ragged.context_lengths, ragged.runs, 16)
    assert torch.equal(paged_attention_native(ragged, q, k, v, scale=1.0), expected)


def test_pages_that_do_not_reach_are_refused():
    k, v = pools(1, 64, 16)
    q = torch.randn(1, 2, 64).bfloat16()
    for lengths, pages in (([1], [(1, 0)]), ([17], [(1, 1)]), ([16], [(PAGES, 1)])):
        with pytest.raises(AssertionError):
            paged_attention_native(Ragged([1], lengths, [pages], 16), q, k, v, scale=1.0)
