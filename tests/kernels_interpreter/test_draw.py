"""The kernels' draws are those of the CPU: the same numbers, and the same tokens from equal logits."""

import torch
import triton
import triton.language as tl

from quartet.kernels.ops import resolve
from quartet.kernels.reference import philox
from quartet.kernels.triton.draw import uniform
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.sampling.choose import sample
from quartet.scheduler_service.sampling.rows import sampling_rows
from quartet.scheduler_service.sampling.state import settings_of
from tests.kernels.cases import Maker
from tests.kernels.sampling import LOGITS_BLOCK

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.2, top_k=6),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.7, min_p=0.01),
]


@triton.jit
def _uniform(seeds_ptr, positions_ptr, out_ptr):
    row = tl.program_id(0)
    tl.store(out_ptr + row, uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)))


def test_numbers_are_those_of_the_cpu_bit_for_bit() -> None:
    make = Maker(torch.float32, "cpu")
    seeds = make.integers(-(2**63), 2**63 - 1, 40, dtype=torch.int64)
    positions = torch.cat((make.integers(0, 1 << 31, 38, dtype=torch.int64), torch.tensor([0, 1 << 27])))
    out = torch.empty(40, dtype=torch.float64)
    _uniform[(40,)](seeds, positions, out)
    assert torch.equal(out, philox.uniform(seeds, positions))


def test_select_chooses_the_tokens_that_the_cpu_sampler_chooses() -> None:
    make = Maker(torch.float32, "cpu")
    params, rows, vocab = PARAMS * 3, len(PARAMS) * 3, 5000
    logits = make.normal(rows, vocab, scale=3.0)
    positions = list(range(100, 100 + rows))
    settings = [settings_of(each, seed) for seed, each in enumerate(params)]
    expected = sample(logits.clone(), sampling_rows(settings, positions)).tokens
    assert choose_by_kernels(logits, params, list(range(rows)), positions).tolist() == expected.tolist()


def choose_by_kernels(
    logits: torch.Tensor, params: list[SamplingParams], seeds: list[int], positions: list[int]
) -> torch.Tensor:
    """As a step on a GPU does it, with what a batch of these parameters needs."""
    ops = resolve("cpu", "triton")
    rows, vocab = logits.shape
    temperatures = torch.tensor([0.0 if each.greedy else each.temperature for each in params])
    tops, masses = (torch.empty(rows, -(-vocab // LOGITS_BLOCK)) for _ in range(2))
    ops.process_logits(logits, None, temperatures, tops, masses)
    tokens, valid = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int32)
    ops.select(
        logits,
        tops,
        masses,
        temperatures,
        torch.tensor([max(0, each.top_k) for each in params], dtype=torch.int32),
        torch.tensor([each.top_p for each in params]),
        torch.tensor([each.min_p for each in params]),
        torch.tensor(seeds),
        torch.tensor(positions),
        torch.empty(rows, vocab, dtype=torch.int32),
        tokens,
        valid,
    )
    assert valid.all()
    return tokens


def test_a_row_without_a_finite_largest_logit_is_reported_and_its_neighbours_are_not() -> None:
    ops = resolve("cpu", "triton")
    logits = torch.zeros(4, 300)
    logits[0, 7], logits[1, 299], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 5] = 9.0
    tops, masses = torch.empty(4, 1), torch.empty(4, 1)
    zeros = torch.zeros(4)
    tokens, valid = torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.int32)
    ops.process_logits(logits, None, zeros, tops, masses)
    ops.draw(logits, tops, masses, LOGITS_BLOCK, zeros, zeros.long(), zeros.long(), None, tokens, valid)
    assert valid.tolist() == [0, 0, 0, 1]
    assert tokens[3] == 5
    assert (tokens >= 0).all() and (tokens < 300).all()  # an id outside would read outside
