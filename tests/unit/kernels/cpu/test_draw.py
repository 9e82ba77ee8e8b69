"""The kernel that draws tokens, beside its numbers from Philox and the same steps in float64."""

import ctypes
import math
import random

import numpy as np
import pytest
import torch

from quartet.kernels.cpu.draw import RowsToDraw, can_draw, draw_rows, log_of_sums
from quartet.kernels.cpu.mask import mask_rows
from quartet.kernels.cpu.native import library
from quartet.kernels.cpu.native.library import INSTRUCTION_SETS, Library
from quartet.kernels.reference.philox import uniform


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def kernels(request, monkeypatch):
    """The draws of each instruction set that the machine has."""
    if library.library() is None:
        pytest.skip("no CPU kernels on this machine")
    try:
        found = Library(library.functions(request.param), request.param)
    except LookupError:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(library, "library", lambda: found)
    monkeypatch.setattr(library, "at_hand", lambda: found)
    return found


def drawn(logits, settings, allowed=None):
    """Tokens and whether they are valid; `settings` by row: (temperature, top_k, top_p, min_p, seed, position)."""
    assert can_draw(logits)
    return draw_rows(logits, RowsToDraw(*map(list, zip(*settings, strict=True))), allowed)


def some_settings(count):
    """Every combination of filters, at several temperatures."""
    return [(0.9 if i % 7 else 0.0, 30 * (i % 2), 0.95 if i % 3 else 1.0, 0.01 * (i % 4), i, 7) for i in range(count)]


def some_mask(rows, vocab):
    """Rows that allow all, one, few, most and every second token; int32 (rows, words)."""
    bits = torch.zeros(rows, -(-vocab // 32) * 32, dtype=torch.bool)
    generator = torch.Generator().manual_seed(vocab)
    for row, own in enumerate(bits):
        share = (1.0, 0.0, 8 / vocab, 0.999, 0.5)[row % 5]
        own[:] = torch.rand(len(own), generator=generator) < share
        own[int(torch.randint(vocab, (1,), generator=generator))] = True
        if row % 5 == 3:
            own[: vocab // 2] = True  # whole blocks
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little").view(np.int32)
    return torch.from_numpy(packed)


def kept(logits, temperature, top_k, top_p, min_p):
    """The weights (vocab,) float64 that a draw chooses among, by sorting."""
    weights = torch.exp((logits.double() - logits.double().max()) / temperature)
    order = weights.argsort(descending=True, stable=True)
    values = weights[order]
    floor = min_p
    if 0 < top_k < len(weights):
        floor = max(floor, values[top_k - 1].item())
    if top_p < 1:
        place = torch.searchsorted(values.cumsum(0), top_p * values.sum()).clamp(max=len(values) - 1)
        floor = max(floor, values[place].item())
    return torch.where(weights >= floor * (1 - 1e-6), weights, 0)


def test_the_numbers_are_those_of_philox(kernels):
    number = kernels.functions.quartet_uniform
    number.argtypes, number.restype = (ctypes.c_int64, ctypes.c_int64), ctypes.c_double
    rng = random.Random(0)
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), *(rng.getrandbits(64) - 2**63 for _ in range(200))]
    positions = [0, 1, 2**31, 2**32 - 1, 7, *(rng.getrandbits(31) for _ in range(200))]
    expected = uniform(torch.tensor(seeds), torch.tensor(positions)).tolist()
    assert [number(*both) for both in zip(seeds, positions, strict=True)] == expected


@pytest.mark.parametrize("vocab", [1, 15, 255, 256, 257, 4096, 151_936])
@pytest.mark.parametrize("spread", [0.01, 2.0, 30.0])
def test_a_draw_stays_in_what_is_kept_and_passes_its_share(vocab, spread):
    rng = random.Random(vocab)
    logits = torch.randn(24, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    settings = [
        (
            rng.choice([0.3, 1.0, 1.7]),
            rng.choice([0, 0, 1, 5, 50, 700, 10**6]),
            rng.choice([1.0, 1.0, 1e-6, 0.3, 0.9, 0.999]),
            rng.choice([0.0, 0.0, 0.02, 1.0]),
            rng.getrandbits(62),
            rng.randrange(10**6),
        )
        for _ in logits
    ]
    tokens, valid = drawn(logits, settings)
    assert valid.all()
    for row, (*filters, seed, position), token in zip(logits, settings, tokens.tolist(), strict=True):
        weights = kept(row, *filters)
        assert weights[token] > 0
        below, share = weights[:token].sum() / weights.sum(), weights[token] / weights.sum()
        number = uniform(torch.tensor([seed]), torch.tensor([position])).item()
        # float32 weights, and a floor that lies a rounding beside: the tokens at the border may count or not
        border = weights[(weights > 0) & (weights <= weights[weights > 0].min() * (1 + 1e-5))].sum() / weights.sum()
        slack = 1e-4 + (border if filters[1:] != [0, 1.0, 0.0] else 0)
        assert below - slack <= number <= below + share + slack, (filters, token)


def test_a_row_draws_the_same_in_any_company_and_place():
    logits = torch.randn(40, 3001)
    settings = [(0.8, 40 * (i % 2), 0.9 if i % 3 else 1.0, 0.01 * (i % 5), i, 7) for i in range(40)]
    together, _ = drawn(logits, settings)
    for i in range(40):
        alone, _ = drawn(logits[i : i + 1].clone(), settings[i : i + 1])
        assert alone.item() == together[i]
    wide = torch.full((40, 5000), 99.0)
    wide[:, :3001] = logits
    assert torch.equal(drawn(wide[:, :3001], settings)[0], together)  # rows that do not follow one another


def test_every_instruction_set_has_the_bits_of_the_lowest(kernels, monkeypatch):
    logits = torch.randn(30, 20_011, generator=torch.Generator().manual_seed(4)) * 3
    settings, allowed = some_settings(30), some_mask(30, 20_011)
    found = drawn(logits, settings)[0], drawn(logits, settings, allowed)[0], log_of_sums(logits)
    lowest = Library(library.functions(INSTRUCTION_SETS[0]), INSTRUCTION_SETS[0])
    monkeypatch.setattr(library, "library", lambda: lowest)
    again = drawn(logits, settings)[0], drawn(logits, settings, allowed)[0], log_of_sums(logits)
    assert all(map(torch.equal, found, again))


def test_temperature_zero_takes_the_first_largest_whatever_the_filters_say():
    logits = torch.randn(9, 1000)
    logits[:, 40] = logits[:, 700] = logits[:, 999] = 50.0
    tokens, _ = drawn(logits, [(0.0, 3 * (i % 2), 0.5, 0.3, i, 1) for i in range(9)])
    assert tokens.tolist() == [40] * 9


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 255, 257, 2048, 4100, 151_936])
def test_a_mask_gives_the_tokens_of_logits_that_were_masked(vocab):
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    allowed, settings, before = some_mask(40, vocab), some_settings(40), logits.clone()
    tokens, valid = drawn(logits, settings, allowed)
    assert torch.equal(logits, before) and valid.all()
    assert mask_rows(logits, allowed)
    expected, _ = drawn(logits, settings)
    assert torch.equal(tokens, expected)
    assert logits.gather(1, tokens.unsqueeze(1)).isfinite().all()


def test_only_what_is_allowed_can_break_a_row():
    logits, settings = torch.zeros(4, 600), [(0.0, 0, 1.0, 0.0, 1, 1), (1.0, 0, 1.0, 0.0, 1, 1)] * 2
    logits[:, 5], logits[:, 300] = math.nan, math.inf
    allowed = torch.zeros(4, 19, dtype=torch.int32)
    allowed[:2, 8] = 1  # token 256
    allowed[2, 0], allowed[3, 9] = 1 << 5, 1 << 12  # the broken ones
    tokens, valid = drawn(logits, settings, allowed)
    assert valid.tolist() == [True, True, False, False] and tokens.tolist() == [256, 256, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_row_without_an_allowed_token_is_reported(temperature, top_k):
    allowed = torch.zeros(1, 10, dtype=torch.int32)
    allowed[0, 9] = -1 << 12  # bits behind the last token
    tokens, valid = drawn(torch.randn(1, 300), [(temperature, top_k, 1.0, 0.0, 1, 1)], allowed)
    assert (tokens.tolist(), valid.tolist()) == ([0], [False])


def test_a_temperature_is_the_same_as_logits_that_were_divided_by_it():
    logits = torch.randn(64, 4096) * 4
    settings = [(0.7, 50 * (i % 2), 0.95, 0.0, i, 1) for i in range(64)]
    assert torch.equal(drawn(logits, settings)[0], drawn(logits / 0.7, [(1.0, *rest) for _, *rest in settings])[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_reported(bad):
    logits = torch.randn(3, 300)
    logits[1] = bad
    tokens, valid = drawn(logits, [(1.0, 5, 0.9, 0.1, 3, 4)] * 3)
    assert valid.tolist() == [True, False, True] and tokens[1] == 0


def test_tokens_tied_at_the_floor_all_stay():
    logits = torch.zeros(2000, 600)
    logits[:, 100] = 3.0
    tokens, _ = drawn(logits, [(1.0, 2, 1.0, 0.0, seed, 0) for seed in range(2000)])
    assert len(set(tokens.tolist())) > 500


def test_draws_follow_the_distribution():
    weights = torch.tensor([0.5, 0.2, 0.0, 0.2, 0.1])
    count = 20_000
    tokens, _ = drawn(weights.log().repeat(count, 1), [(1.0, 0, 1.0, 0.0, 11, i) for i in range(count)])
    counts = torch.bincount(tokens, minlength=5)
    expected = weights[weights > 0] * count
    assert counts[2] == 0
    assert ((counts[weights > 0] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


@pytest.mark.parametrize("vocab", [1, 15, 300, 4096, 151_936])
@pytest.mark.parametrize("spread", [0.01, 5.0, 60.0])
def test_logs_of_sums_are_those_of_float64_and_depend_on_their_row_alone(vocab, spread):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    logits[2, vocab // 2 :] = -math.inf
    logits[2, 0] = 4.0
    found = log_of_sums(logits)
    expected = torch.logsumexp(logits.double(), 1, keepdim=True)
    assert (found - expected).abs().max() <= 2e-6 * max(1.0, expected.abs().max())
    assert torch.equal(found, torch.cat([log_of_sums(logits[i : i + 1].clone()) for i in range(5)]))


def test_the_log_of_a_sum_that_is_none_is_not_a_number():
    logits = torch.tensor([[0.0, math.nan], [-math.inf, -math.inf], [0.0, 0.0]])
    assert log_of_sums(logits).isnan().flatten().tolist() == [True, True, False]
