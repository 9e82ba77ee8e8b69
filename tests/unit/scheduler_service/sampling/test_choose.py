"""The sampler against plain Python that does one request at a time, sorts everything and knows no blocks.

All of it twice: with torch's operations, and with the CPU kernel where there is one.
"""

import math
import random
from array import array

import pytest
import torch

from quartet.kernels.cpu.native import library
from quartet.kernels.reference.philox import uniform
from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.sampling import choose as module
from quartet.scheduler_service.sampling.adjust import adjust_single_tokens
from quartet.scheduler_service.sampling.choose import draw, largest, mask_and_temper, unpack_bits
from quartet.scheduler_service.sampling.rows import Draws, Row, sampling_rows
from quartet.scheduler_service.sampling.state import make_row

EOS = 3


@pytest.fixture(params=["torch", "kernel"], autouse=True)
def by(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "can_draw", lambda logits: False)
    elif library.library() is None:
        pytest.skip("no CPU kernels on this machine")
    return request.param


def sequence(params: SamplingParams, output: list[int] = (), seed: int = 0, prompt: int = 5) -> Sequence:
    request = Request(rid="r", params=params, seed=seed)
    return Sequence(request, array("i", [7] * prompt) + array("i", output), prompt)


def adjust(logits: torch.Tensor, rows: list[Row], positions: list[int], allowed: torch.Tensor | None = None) -> None:
    """All that is done to the logits before the draw."""
    adjust_single_tokens(logits, rows, positions)
    mask_and_temper(logits, sampling_rows([row.settings for row in rows], positions), allowed)


def choose(logits: torch.Tensor, rows: list[Row], positions: list[int], keep_logits: bool = False) -> Draws:
    return module.choose(logits, sampling_rows([row.settings for row in rows], positions), keep_logits)


def sample(logits: torch.Tensor, sequences: list[Sequence], allowed: torch.Tensor | None = None) -> list[int]:
    rows = [make_row(s, [EOS]) for s in sequences]
    positions = [len(s.ids) for s in sequences]
    own = logits.clone()
    adjust(own, rows, positions, allowed)
    draws = choose(own, rows, positions)
    assert all(draws.valid)
    return draws.tokens.tolist()


# One request at a time, in plain Python


def plain_adjusted(logits: list[float], s: Sequence) -> list[float]:
    params, output = s.request.params, list(s.ids[s.prompt_len :])
    values = list(logits)
    for token in set(output):
        value = values[token] - params.frequency_penalty * output.count(token) - params.presence_penalty
        values[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    if len(output) < params.min_new_tokens:
        for token in {EOS, *(params.stop_token_ids or ())}:
            values[token] = -math.inf
    for token, bias in (params.logit_bias or {}).items():
        values[int(token)] += bias
    return values


def plain_weights(logits: list[float], s: Sequence) -> list[float]:
    """What is left to draw from, with zeros for what was filtered."""
    params = s.request.params
    values = plain_adjusted(logits, s)
    best = max(values)
    weights = [math.exp((value - best) / params.temperature) for value in values]
    kept = set(range(len(weights)))
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if params.top_k > 0:
        kept &= set(order[: params.top_k])
    before, total = 0.0, sum(weights)
    for token in order:
        if before >= params.top_p * total:
            kept.discard(token)
        before += weights[token]
    kept -= {i for i, weight in enumerate(weights) if weight < params.min_p}
    return [weight if i in kept else 0.0 for i, weight in enumerate(weights)]


def plain_token(logits: list[float], s: Sequence) -> int:
    if s.request.params.greedy:
        values = plain_adjusted(logits, s)
        return values.index(max(values))
    weights = plain_weights(logits, s)
    number = float(uniform(torch.tensor([s.request.seed]), torch.tensor([len(s.ids)])))
    left = number * sum(weights)
    for token, weight in enumerate(weights):
        left -= weight
        if left < 0 and weight:
            return token
    raise AssertionError("the number is beyond the distribution")


def random_params(rng: random.Random, vocab: int) -> SamplingParams:
    def maybe(value, default):
        return value if rng.random() < 0.4 else default

    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.8, 1.0, 1.7]),
        top_k=maybe(rng.choice([1, 2, 5, 40, vocab * 2]), -1),
        top_p=maybe(rng.uniform(0.05, 0.99), 1.0),
        min_p=maybe(rng.uniform(0.001, 0.5), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        min_new_tokens=maybe(6, 0),
        stop_token_ids=maybe([1, 4], None),
        logit_bias=maybe({str(rng.randrange(vocab)): rng.uniform(-5, 5) for _ in range(3)}, None),
    )


@pytest.mark.parametrize("vocab", [40, 256, 1000, 3001])
def test_random_parameters_draw_what_plain_python_draws(vocab):
    rng = random.Random(vocab)
    logits = torch.randn(48, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    sequences = [
        sequence(
            random_params(rng, vocab),
            [rng.randrange(min(vocab, 60)) for _ in range(rng.randint(0, 12))],
            rng.getrandbits(62),
        )
        for _ in logits
    ]
    assert sample(logits, sequences) == [plain_token(row.tolist(), s) for row, s in zip(logits, sequences, strict=True)]


def test_a_row_does_not_depend_on_its_neighbours():
    rng = random.Random(5)
    logits = torch.randn(32, 3001, generator=torch.Generator().manual_seed(5)) * 2
    sequences = [sequence(random_params(rng, 3001), [], rng.getrandbits(62)) for _ in logits]
    together = sample(logits, sequences)
    assert together == [sample(logits[i : i + 1], sequences[i : i + 1])[0] for i in range(32)]


def test_draws_follow_the_distribution():
    weights = torch.tensor([0.5, 0.2, 0.0, 0.2, 0.1])
    count = 20000
    positions = list(range(count))
    rows = [make_row(sequence(SamplingParams(), seed=11), [])] * count
    tokens = choose(weights.log().repeat(count, 1), rows, positions).tokens
    counts = torch.bincount(tokens, minlength=5)
    assert counts[2] == 0
    expected = weights[weights > 0] * count
    assert ((counts[weights > 0] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


def test_position_and_seed_both_move_the_draw():
    logits = torch.zeros(64, 1000)
    by_position = choose(
        logits.clone(), [make_row(sequence(SamplingParams(), seed=1), [])] * 64, list(range(64))
    ).tokens.tolist()
    by_seed = choose(
        logits.clone(), [make_row(sequence(SamplingParams(), seed=i), []) for i in range(64)], [0] * 64
    ).tokens.tolist()
    assert len(set(by_position)) > 55 and len(set(by_seed)) > 55


def test_greedy_is_temperature_zero_and_top_k_one():
    logits = torch.randn(3, 500)
    params = [SamplingParams(temperature=0.0), SamplingParams(top_k=1), SamplingParams(temperature=1e-7)]
    assert sample(logits, [sequence(p) for p in params]) == logits.argmax(1).tolist()


def test_tokens_tied_at_the_border_of_top_k_all_stay():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    seen = {sample(logits, [sequence(SamplingParams(top_k=2), seed=seed)])[0] for seed in range(200)}
    assert seen == {0, 1, 2}


def test_a_tiny_top_p_leaves_only_the_best():
    logits = torch.randn(8, 999)
    sequences = [sequence(SamplingParams(top_p=1e-6), seed=i) for i in range(8)]
    assert sample(logits, sequences) == logits.argmax(1).tolist()


def test_top_p_of_a_flat_distribution_keeps_the_larger_part_of_the_vocabulary():
    logits = torch.linspace(0, 0.01, 3000).repeat(200, 1)
    tokens = sample(logits, [sequence(SamplingParams(top_p=0.5), seed=i) for i in range(200)])
    assert min(tokens) > 1480 and max(tokens) - min(tokens) > 1200


def test_allowed_tokens_bound_the_draw_but_a_bias_cannot_lift_the_mask():
    words = torch.zeros(1, 2, dtype=torch.int32)
    words[0, 0], words[0, 1] = -(2**31), 2  # tokens 31 and 33
    assert unpack_bits(words, 40)[0].nonzero().flatten().tolist() == [31, 33]
    params = SamplingParams(logit_bias={"2": 100.0})
    seen = {sample(torch.zeros(1, 40), [sequence(params, seed=seed)], words)[0] for seed in range(50)}
    assert seen == {31, 33}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_reported_and_harms_no_other(bad, temperature):
    logits = torch.randn(3, 300)
    expected = sample(logits, [sequence(SamplingParams(temperature=temperature), seed=4)] * 3)
    logits[1, 17] = bad
    rows = [make_row(sequence(SamplingParams(temperature=temperature), seed=4), [])] * 3
    draws = choose(logits, rows, [5] * 3)
    assert draws.valid.tolist() == [True, False, True]
    assert [draws.tokens[0], draws.tokens[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("vocab", [300, 10_000])  # sorted as a whole, and through a histogram
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 5}])
def test_whatever_filters_a_broken_row_its_token_can_be_looked_up_and_others_draw_theirs(vocab, bad, filters):
    logits = torch.randn(3, vocab)
    sequences = [sequence(SamplingParams(**filters), seed=4)] * 3
    expected = sample(logits, sequences)
    logits[1] = bad
    draws = choose(logits, [make_row(s, []) for s in sequences], [5] * 3, keep_logits=True)
    assert draws.valid.tolist() == [True, False, True] and 0 <= draws.tokens[1] < vocab
    assert [draws.tokens[0], draws.tokens[2]] == [expected[0], expected[2]]


def test_a_row_without_any_allowed_token_is_reported():
    logits = torch.full((1, 300), -math.inf)
    assert choose(logits, [make_row(sequence(SamplingParams()), [])], [5]).valid.tolist() == [False]


def test_draw_at_the_edges_never_picks_what_has_no_weight():
    weights = torch.zeros(4, 1000)
    weights[0, 999] = weights[1, 0] = weights[2, 300] = weights[3, 256] = 1.0
    for number in (2.0**-33, 0.5, 1 - 2.0**-33):
        assert draw(weights, torch.full((4,), number, dtype=torch.float64)).tolist() == [999, 0, 300, 256]


@pytest.mark.parametrize("width", [100, 128 * 40, 128 * 40 + 77])
@pytest.mark.parametrize("k", [1, 7])
def test_largest_is_topk(width, k):
    x = torch.randn(5, width)
    values, columns = largest(x, k)
    expected = x.topk(k, 1)
    assert torch.equal(values, expected.values)
    assert torch.equal(x.gather(1, columns), expected.values)


def test_weights_are_those_of_exp_down_to_the_least_and_masked_tokens_have_none():
    distances = torch.tensor([[0.0, -1.0, -86.0, -90.0, -1e4, -torch.inf], [torch.nan] * 6])
    weights = module.weights_of(distances.clone())
    assert weights[0, :3].tolist() == torch.exp(distances[0, :3]).tolist()
    assert weights[0, 3:].tolist() == [0.0, 0.0, 0.0]
    assert weights[1].isnan().all()
