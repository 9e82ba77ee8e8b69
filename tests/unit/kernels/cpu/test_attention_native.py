"""Paged attention by our own kernels against the float64 reference, and the bits of a query in any company, on every
instruction set that this machine has."""

import random

import pytest
import torch

from quartet.kernels.cpu.attention import paged_attention_reference
from quartet.kernels.cpu.attention_native import groups, page_table, paged_attention_native
from quartet.kernels.cpu.attention_schedule import Ragged, Run, page_list
from quartet.kernels.cpu.native import build, library
from quartet.kernels.cpu.native.library import INSTRUCTION_SETS, Library

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

PAGES = 300
BRANCHING_TOKENS = 4800  # of the pool that `branching` is about
TOLERANCE = 2e-2  # of results around 1: weights are rounded to bfloat16 before they meet the values


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def kernels(request, monkeypatch):
    try:
        found = Library(library.functions(request.param), request.param)
    except LookupError:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(library, "library", lambda: found)
    return found


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


def pools(kv_heads: int, dim: int, page_size: int, pages: int = PAGES) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (torch.randn(kv_heads, pages * page_size, dim).bfloat16() for _ in range(2))
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


def branching(rng: random.Random, page_size: int) -> Ragged:
    """Decode rows: five that begin with the same 272 tokens, of which four share more; four with other 128; others; a
    chunk of a prompt that begins like the first."""
    pages_of_pool = BRANCHING_TOKENS // page_size
    free = iter(rng.sample(range(1, pages_of_pool), pages_of_pool - 1))

    def pages(tokens: int) -> list[Run]:
        return [(next(free), 1) for _ in range(tokens // page_size)]

    first, more, second = pages(272), pages(48), pages(128)
    heads = [first, *[first + more] * 2, second, *[first + more] * 2, second, second, second, [], [], first]
    lengths = [273, 330, 390, 144, 325, 400, 290, 129, 160, 5, 333, 400]
    runs = [
        head + pages(-(-length // page_size) * page_size - page_size * len(head))
        for head, length in zip(heads, lengths, strict=True)
    ]
    return Ragged([1] * 11 + [40], lengths, runs, page_size)


def test_sequences_of_one_query_that_begin_alike_are_grouped():
    found = groups(branching(random.Random(0), 16))
    assert found is not None
    members, sharing = found.members.tolist(), [tuple(row) for row in found.sharing.tolist()]
    assert sorted(members) == list(range(12)), "every sequence once"
    assert sorted(sharing[:2]) == [(4, 128), (5, 256)] and sharing[2:] == [(1, 0)] * 3, sharing
    for count, keys in sharing[:2]:
        some, members = members[:count], members[count:]
        assert set(some) == ({0, 1, 2, 4, 5} if keys == 256 else {3, 6, 7, 8})
    assert members == [11, 10, 9], "the chunk, which is long, first"


def test_a_group_is_not_shortened_by_half():
    """Four share 512 tokens; that a fifth and a sixth share 128 of them makes another group, too small to pay."""
    long, runs = [(page, 1) for page in range(1, 33)], []
    for i in range(4):
        runs.append([*long, (100 + i, 1)])
    for i in range(2):
        runs.append([*long[:8], (200 + i, 32)])
    found = groups(Ragged([1] * 6, [520] * 6, runs, 16))
    assert found is not None
    assert found.sharing.tolist() == [[4, 512], [1, 0], [1, 0]] and sorted(found.members.tolist()[:4]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("queries", "contexts", "runs"),
    [
        ([1] * 3, [300] * 3, [[(1, 16), (20 + i, 4)] for i in range(3)]),
        ([1] * 8, [300] * 8, [[(20 * i + 1, 19)] for i in range(8)]),
        ([1] * 8, [300] * 8, [[(1, 7), (20 + 13 * i, 13)] for i in range(8)]),
        ([2] * 8, [300] * 8, [[(1, 16), (20 + 4 * i, 4)] for i in range(8)]),
        ([1] * 8, [128] * 8, [[(1, 8)]] * 8),
    ],
    ids=["few", "nothing shared", "less than a block", "several queries", "the last token's own page"],
)
def test_there_are_no_groups_where_they_do_not_pay(queries, contexts, runs):
    assert groups(Ragged(queries, contexts, runs, 16)) is None


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(14, 2, 64), (6, 6, 32), (9, 3, 128), (40, 5, 64), (16, 1, 96), (40, 2, 64)]
)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_rows_that_share_tiles_have_the_bits_they_have_alone(heads, kv_heads, dim, page_size):
    """Rows of several heads, and of sequences that begin with the same keys."""
    ragged = branching(random.Random(page_size), page_size)
    k, v = pools(kv_heads, dim, page_size, BRANCHING_TOKENS // page_size)
    q = torch.randn(sum(ragged.query_lengths), heads, dim).bfloat16()
    assert page_table(ragged).groups is not None
    result = paged_attention_native(ragged, q, k, v, scale=dim**-0.5)
    expected = paged_attention_reference(ragged, q, k, v, scale=dim**-0.5)
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    row = 0
    for count, length, runs in zip(ragged.query_lengths, ragged.context_lengths, ragged.runs, strict=True):
        alone = Ragged([count], [length], [runs], page_size)
        own = paged_attention_native(alone, q[row : row + count], k, v, scale=dim**-0.5)
        assert torch.equal(own, result[row : row + count]), (row, count, length)
        row += count


@pytest.mark.parametrize("options", [{"window": 100}, {"softcap": 5.0}], ids=str)
def test_options_of_sequences_that_begin_alike_agree_with_reference(options):
    check(branching(random.Random(3), 16), 14, 2, 64, **options)


def test_numbers_that_are_none_stay_with_their_sequence():
    ragged = branching(random.Random(5), 16)
    k, v = pools(2, 64, 16)
    q = torch.randn(sum(ragged.query_lengths), 14, 64).bfloat16()
    expected = paged_attention_native(ragged, q, k, v, scale=0.125)
    last = ragged.runs[2][-1][0] * 16
    k[:, last], v[:, last] = torch.nan, torch.inf
    result = paged_attention_native(ragged, q, k, v, scale=0.125)
    assert result[2].isnan().all()
    others = [row for row in range(len(q)) if row != 2]
    assert torch.equal(result[others], expected[others])


def with_threads(count: int, *arguments, **options) -> torch.Tensor:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return paged_attention_native(*arguments, **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (4, 1, 256), (3, 3, 32)])
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_a_long_sequence_has_the_same_bits_whoever_computes_its_parts(heads, kv_heads, dim, window, queries):
    rng, lengths = random.Random(6), [4200, 2049, 2048, 2047, 100]
    k, v = pools(kv_heads, dim, 16)
    runs = [scattered(rng, -(-length // 16)) for length in lengths]
    q = torch.randn(5 * queries, heads, dim).bfloat16()
    options = {"scale": dim**-0.5, "window": window}
    whole = with_threads(1, Ragged([queries] * 5, lengths, runs, 16), q, k, v, **options)
    expected = paged_attention_reference(Ragged([queries] * 5, lengths, runs, 16), q, k, v, **options)
    torch.testing.assert_close(whole.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    for threads in (2, 5, 11):
        together = with_threads(threads, Ragged([queries] * 5, lengths, runs, 16), q, k, v, **options)
        assert torch.equal(together, whole), threads
        for number, length in enumerate(lengths):
            own = slice(number * queries, (number + 1) * queries)
            alone = with_threads(threads, Ragged([queries], [length], [runs[number]], 16), q[own], k, v, **options)
            assert torch.equal(alone, whole[own]), (threads, length)


@pytest.mark.parametrize("shared", [384, 2048, 2176])
def test_long_beginnings_that_are_shared_have_the_bits_they_have_alone(shared):
    rng, lengths = random.Random(7), [shared + more for more in (1, 100, 130, 514, 600)]
    head = scattered(rng, shared // 16)
    k, v = pools(2, 64, 16)
    runs = [head + scattered(rng, -(-(length - shared) // 16)) for length in lengths]
    q = torch.randn(5, 14, 64).bfloat16()
    ragged = Ragged([1] * 5, lengths, runs, 16)
    table = page_table(ragged)
    assert table.groups is not None and table.groups.sharing[0].tolist() == [5, shared]
    together = paged_attention_native(ragged, q, k, v, scale=0.125)
    for row, (length, its_runs) in enumerate(zip(lengths, runs, strict=True)):
        alone = paged_attention_native(Ragged([1], [length], [its_runs], 16), q[row : row + 1], k, v, scale=0.125)
        assert torch.equal(alone, together[row : row + 1]), length
