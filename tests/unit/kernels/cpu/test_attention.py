"""Paged attention against the float64 reference, over random page tables."""

import random

import pytest
import torch

from quartet.kernels.cpu.attention import merge, paged_attention, paged_attention_reference
from quartet.kernels.cpu.attention_schedule import Ragged, segments, shared_pages

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def make_runs(pages: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][0] + runs[-1][1] == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs


def scattered(rng: random.Random, pages: int, count: int) -> list[tuple[int, int]]:
    return make_runs(rng.sample(range(1, pages), count))


def contiguous(rng: random.Random, pages: int, count: int) -> list[tuple[int, int]]:
    return [(rng.randrange(1, pages - count), count)]


def check(ragged: Ragged, heads: int = 6, kv_heads: int = 2, dim: int = 16, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(ragged.query_lengths)
    pool_tokens = 400 * ragged.page_size
    q = torch.randn(tokens, heads, dim, generator=generator).to(dtype)
    k, v = (torch.randn(kv_heads, pool_tokens, dim, generator=generator).to(dtype) for _ in range(2))
    options.setdefault("scale", dim**-0.5)
    result = paged_attention(ragged, q, k, v, **options)
    expected = paged_attention_reference(ragged, q, k, v, **options)
    assert result.dtype == dtype and result.shape == q.shape
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def mixed(placement, page_size: int = 4, seed: int = 0) -> Ragged:
    """Decode rows of short and long contexts, then chunks at the start and in the middle of prompts."""
    rng = random.Random(seed)
    queries = [1] * 7 + [5, 40, 3, 150]
    contexts = [1, 2, 30, 31, 90, 200, 333, 5, 70, 120, 190]
    runs = [placement(rng, 400, -(-length // page_size)) for length in contexts]
    return Ragged(queries, contexts, runs, page_size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("placement", [contiguous, scattered])
def test_mixed_batch_agrees_with_reference(placement, dtype):
    check(mixed(placement), dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 8},
        {"window": 64},
        {"softcap": 5.0},
        {"softcap": 5.0, "window": 33},
        {"sinks": torch.linspace(-2, 2, 6)},
        {"sinks": torch.linspace(-2, 2, 6), "window": 16},
        {"scale": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("placement", [contiguous, scattered])
def test_options_agree_with_reference(placement, options):
    check(mixed(placement), **options)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bidirectional_attention_agrees_with_reference(softcap):
    rng = random.Random(1)
    contexts = [7, 64, 150]
    ragged = Ragged(list(contexts), contexts, [scattered(rng, 400, -(-n // 4)) for n in contexts], 4)
    check(ragged, causal=False, softcap=softcap)


@pytest.mark.parametrize("page_size", [1, 16])
def test_page_sizes_agree_with_reference(page_size):
    check(mixed(scattered, page_size), dim=8)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (14, 2)])
def test_head_groups_agree_with_reference(heads, kv_heads):
    check(mixed(contiguous), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("batch_bytes", [0, 1 << 30])
def test_views_and_padded_batches_give_the_same(batch_bytes):
    for placement, window in ((scattered, None), (contiguous, 20)):
        ragged = mixed(placement)
        ragged.batch_bytes = batch_bytes
        check(ragged, window=window)


def shared_batch(rng: random.Random, prefix: list[int], page_size: int = 4) -> Ragged:
    tails = [1, 2, 5, 17, 60, 3]
    pool = [page for page in range(1, 399) if page not in prefix]
    runs = [make_runs(prefix + rng.sample(pool, -(-tail // page_size))) for tail in tails]
    contexts = [len(prefix) * page_size + tail for tail in tails]
    alone = make_runs(rng.sample(pool, 20))
    return Ragged([1] * 7, [*contexts[:3], 80, *contexts[3:]], [*runs[:3], alone, *runs[3:]], page_size)


@pytest.mark.parametrize("prefix", [list(range(10, 60)), list(range(10, 40)) + list(range(100, 130))])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 1, 6)])
def test_shared_prefix_is_attended_once_and_agrees_with_reference(prefix, sinks):
    ragged = shared_batch(random.Random(3), prefix)
    check(ragged, sinks=sinks)
    (plan,) = ragged.schedules.values()
    assert sum(length for _, length in (call.view for call in plan.decode if call.view)) >= len(prefix) * 4
    assert not any(call.view and isinstance(call.rows, slice) and call.view[1] > 100 for call in plan.decode)


def test_identical_contexts_keep_a_tail_of_their_own():
    pages = [(5, 60)]
    check(Ragged([1] * 5, [240] * 5, [pages] * 5, 4))


def test_random_batches_agree_with_reference():
    for seed in range(12):
        rng = random.Random(seed)
        contexts = [rng.randint(1, 120) for _ in range(rng.randint(1, 9))]
        queries = [rng.choice([1, 1, rng.randint(1, n)]) for n in contexts]
        runs = [rng.choice([scattered, contiguous])(rng, 400, -(-n // 3)) for n in contexts]
        check(Ragged(queries, contexts, runs, 3), seed=seed, window=rng.choice([None, 10]))


def test_padding_never_reads_what_lies_behind_a_context():
    """Stale numbers behind a short row's end are hidden even when they are huge."""
    ragged = Ragged([1, 1], [3, 5], [[(1, 1)], [(2, 2)]], 4)
    k, v = torch.zeros(1, 16, 8), torch.zeros(1, 16, 8)
    v[:, 7], k[:, 7] = 1e30, 1e4  # the slot behind the first row's context
    assert paged_attention(ragged, torch.ones(2, 2, 8), k, v, scale=1.0).abs().max() == 0


def test_segments_cut_and_join_runs():
    assert segments([(3, 2), (9, 1)], 4, 0, 12) == [(12, 8), (36, 4)]
    assert segments([(3, 2), (9, 1)], 4, 5, 10) == [(17, 3), (36, 2)]
    assert segments([(3, 2)], 4, 0, 0) == []


def test_shared_pages_count_across_runs():
    assert shared_pages([(3, 2), (9, 4)], [(3, 2), (9, 1)]) == 3
    assert shared_pages([(3, 5)], [(3, 2), (9, 1)]) == 2
    assert shared_pages([(3, 5)], [(4, 5)]) == 0


def test_merge_of_parts_is_attention_over_their_union():
    q, k, v = torch.randn(3, 8), torch.randn(20, 8), torch.randn(20, 8)
    scores = q @ k.T
    parts = [slice(0, 5), slice(5, 20)]
    out = torch.stack([torch.softmax(scores[:, p], 1) @ v[p] for p in parts])
    lse = torch.stack([torch.logsumexp(scores[:, p], 1) for p in parts])
    merged, merged_lse = merge(out, lse)
    torch.testing.assert_close(merged, torch.softmax(scores, 1) @ v)
    torch.testing.assert_close(merged_lse, torch.logsumexp(scores, 1))


def test_by_chunk_each_query_sees_the_pages_of_its_own_chunk() -> None:
    runs = [[(3, 2), (9, 3)], [(20, 1)]]
    found = Ragged([9, 1], [17, 2], runs, 4).by_chunk(8)
    assert found.query_lengths == [8, 1, 1]  # positions 8 to 15, position 16; position 1
    assert found.context_lengths == [8, 1, 2]
    assert found.runs == [[(9, 2)], [(11, 1)], [(20, 1)]]
