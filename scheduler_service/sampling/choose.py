"""From logits to tokens, vectorised over a batch of requests with different sampling parameters.

Order of operations: penalties (frequency, presence, minimum length, repetition), logit bias, allowed-token mask,
temperature, then top-k, top-p and min-p on one and the same distribution, then the draw.

The draw is a pure function of (logits, parameters, seed, position): a uniform number from a counter-based generator
(key: the seed, counter: the position) picks the token by the inverse of the cumulative distribution, in vocabulary
order, first among blocks of `BLOCK` tokens, then inside the block. No row looks at another, so a request draws the
same tokens alone and in company, before and after a retraction. Greedy requests take the first largest logit.

On a CPU a kernel of our own draws (kernels/cpu/draw.py); what stands here in torch is for GPUs without fused operations
and for machines without that kernel.
"""

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import torch

from quartet.kernels.cpu.draw import RowsToDraw, can_draw, draw_rows
from quartet.kernels.cpu.largest import largest_of_rows
from quartet.kernels.cpu.mask import mask_rows
from quartet.kernels.reference.philox import uniform
from quartet.scheduler_service.host.transfer import send, upload
from quartet.scheduler_service.sampling.rows import Draws, Feature, SamplingRows

LEAST_EXPONENT = -87.0  # whose exp is a normal float32
LEAST_WEIGHT = 2e-38  # smaller ones are 0; a draw tells apart shares of 1e-16
BLOCK = 256  # tokens whose weights are summed first when drawing
TOP_BLOCK = 128  # tokens that compete through their largest when searching the top k
CACHE_ELEMENTS = 1 << 21  # weights that are worked on at once, so that they stay in the cache
BIN_SHIFT = 18  # bits dropped from a weight to find its bin: 32 bins for each power of two
BINS = (0x3F800000 >> BIN_SHIFT) + 1  # weights are at most 1.0

Floor = Callable[[torch.Tensor, list[Any]], torch.Tensor]  # (weights, by row: a value) → smallest weights that stay


def sample(
    logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
) -> Draws:
    """One token per row of logits (rows, vocab): see model.backend.Backend.sample."""
    if can_draw(logits) and not keep_logits:
        return Draws(*draw_rows(logits, rows_to_draw(rows, rows.temperatures), allowed))
    mask_and_temper(logits, rows, allowed)
    return choose(logits, rows, keep_logits)


def mask_and_temper(logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None) -> None:
    """Allowed tokens and temperature, in place on logits (rows, vocab)."""
    mask_tokens(logits, allowed)
    divisors = [temperature or 1.0 for temperature in rows.temperatures]
    if any(divisor != 1.0 for divisor in divisors):
        logits.div_(upload(divisors, logits.device).unsqueeze(1))


def mask_tokens(logits: torch.Tensor, allowed: torch.Tensor | None) -> None:
    """Set what is not allowed to -inf, in place on logits (rows, vocab).

    `allowed` is a bit mask, int32 (rows, ceil(vocab / 32)): bit i % 32 of word i // 32 allows token i.
    """
    if allowed is not None and not mask_rows(logits, allowed):
        logits.masked_fill_(unpack_bits(~allowed, logits.shape[1]), -inf)


def unpack_bits(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """int32 (rows, words) → bool (rows, vocab), lowest bit first."""
    if words.device.type == "cpu":
        bytes_ = words.numpy().view(np.uint8)
        return torch.from_numpy(np.unpackbits(bytes_, axis=1, count=vocab, bitorder="little").view(np.bool_))
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(2) >> bits & 1).bool().flatten(1)[:, :vocab]


# Choosing the tokens


def choose(logits: torch.Tensor, rows: SamplingRows, keep_logits: bool = False) -> Draws:
    """One token per row of logits (rows, vocab) that were masked and divided by the temperatures.

    They may be overwritten unless they are to be kept.
    """
    if can_draw(logits):
        tempered = [1.0 if temperature else 0.0 for temperature in rows.temperatures]
        return Draws(*draw_rows(logits, rows_to_draw(rows, tempered)))
    best, tokens = largest_of_rows(logits)  # a NaN anywhere in a row makes its largest NaN
    valid = torch.isfinite(best)
    if drawn := rows.drawing():
        choose_by_torch(logits, rows, drawn, keep_logits, best, tokens, valid)
    return Draws(tokens, valid)


def rows_to_draw(rows: SamplingRows, temperatures: list[float]) -> RowsToDraw:
    return RowsToDraw(temperatures, rows.top_ks, rows.top_ps, rows.min_ps, rows.seeds, rows.positions)


def choose_by_torch(
    logits: torch.Tensor,
    rows: SamplingRows,
    drawn: list[int],
    keep_logits: bool,
    best: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """Write the tokens (rows,) of the rows `drawn`; `best` and `valid` (rows,) are those of `choose`."""
    seeds = torch.tensor([rows.seeds[i] for i in drawn])
    numbers = send(uniform(seeds, torch.tensor([rows.positions[i] for i in drawn])), logits.device)
    at_once = max(1, CACHE_ELEMENTS // logits.shape[1])
    for first in range(0, len(drawn), at_once):
        some = drawn[first : first + at_once]
        picked = upload(some, logits.device)
        adjacent = some[-1] - some[0] == len(some) - 1
        own = logits[some[0] : some[-1] + 1] if adjacent and not keep_logits else logits[picked]
        weights = weights_of(own.sub_(best[picked].unsqueeze(1)))
        if weights.device.type == "cpu" and not (usable := valid[picked]).all():
            weights[~usable] = 1.0  # NaN has no place in a histogram; on a GPU there is none
        filter_weights(weights, rows, some)
        tokens[picked] = draw(weights, numbers[first : first + at_once])


def weights_of(distances: torch.Tensor) -> torch.Tensor:
    """exp(distances), in place; 0 where that is too small to be drawn.

    torch.exp takes twenty times as long for numbers whose result is 0 or nearly so, as those of masked tokens are.
    """
    return torch.threshold_(distances.clamp_(min=LEAST_EXPONENT).exp_(), LEAST_WEIGHT, 0.0)


def filter_weights(weights: torch.Tensor, rows: SamplingRows, some: list[int]) -> None:
    """Zero what top-k, top-p and min-p leave out of weights, in place: (len(some), vocab), of the rows `some`.

    Weights are relative to each row's largest, which is 1.
    """
    floor = torch.zeros(len(some), dtype=weights.dtype, device=weights.device)  # smallest weight that stays
    filters: tuple[tuple[int, Floor, list[int] | list[float]], ...] = (
        (Feature.TOP_K, top_k_floor, rows.top_ks),
        (Feature.TOP_P, top_p_floor, rows.top_ps),
        (Feature.MIN_P, min_p_floor, rows.min_ps),
    )
    for feature, smallest, values in filters:
        chosen = rows.using(feature, some)
        if not chosen:
            continue
        picked = upload(chosen, weights.device)
        part = weights if len(chosen) == len(some) else weights[picked]
        floor[picked] = torch.maximum(floor[picked], smallest(part, [values[some[i]] for i in chosen]))
    if (
        weights.device.type != "cpu" or floor.any()
    ):  # looking is cheaper than writing, unless a device must be waited for
        weights.masked_fill_(weights < floor.unsqueeze(1), 0.0)


def top_k_floor(weights: torch.Tensor, top_ks: list[int]) -> torch.Tensor:
    """The k-th largest weight of each row; tokens tied with it stay."""
    ks = [min(top_k, weights.shape[1]) for top_k in top_ks]
    values, _ = largest(weights, max(ks))
    return values.gather(1, upload(ks, weights.device).unsqueeze(1) - 1).squeeze(1)


def top_p_floor(weights: torch.Tensor, top_ps: list[float]) -> torch.Tensor:
    """The smallest weight of the shortest list of best tokens whose share reaches p.

    A histogram over the leading bits of the weights shows in which bin that weight lies; only that bin is sorted.
    A vocabulary that is smaller than the histogram is sorted as a whole; so is any on a GPU, since how many weights
    lie in a bin is not known there without waiting.
    """
    shares = upload(top_ps, weights.device, torch.float64)
    if weights.shape[1] <= BINS or weights.device.type != "cpu":
        values = weights.sort(1, descending=True).values
        mass = values.cumsum(1, dtype=torch.float64)
        place = torch.searchsorted(mass, shares.unsqueeze(1) * mass[:, -1:]).clamp_(max=weights.shape[1] - 1)
        return values.gather(1, place).squeeze(1)
    bins = weights.view(torch.int32) >> BIN_SHIFT  # (rows, vocab), in the order of the weights
    sums = weights.new_zeros(len(top_ps), BINS).scatter_add_(1, bins.long(), weights)
    reached = sums.flip(1).cumsum(1, dtype=torch.float64)  # (rows, BINS), from the best bin on
    target = shares.unsqueeze(1) * reached[:, -1:]  # (rows, 1)
    place = torch.searchsorted(reached, target).clamp_(max=BINS - 1)
    border = BINS - 1 - place  # (rows, 1): the bin of the smallest weight that stays
    missing = target - reached.gather(1, place) + sums.gather(1, border)
    inside = bins == border
    return nth_by_mass(weights[inside], inside.sum(1), missing.squeeze(1))


def nth_by_mass(values: torch.Tensor, counts: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Values come in groups of `counts`; where does each group's sum, from its largest on, reach `target` (groups,)?"""
    ends = counts.cumsum(0)
    group = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts)
    order = values.argsort(descending=True)
    values = values[order[group[order].argsort(stable=True)]]  # by group, then from the largest on
    sums = torch.cat((target.new_zeros(1), values.cumsum(0, dtype=torch.float64)))
    first = torch.searchsorted(sums[1:], sums[ends - counts] + target)
    return values[torch.minimum(first, ends - 1)]


def min_p_floor(weights: torch.Tensor, min_ps: list[float]) -> torch.Tensor:
    return upload(min_ps, weights.device, weights.dtype)


def largest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, best first, and their columns: like torch.topk, but quick on wide rows.

    The k blocks with the largest maxima hold the k largest values, so only those blocks are searched.
    """
    rows, width = x.shape
    blocks = width // TOP_BLOCK
    if k * 4 > blocks:
        values, columns = x.topk(k, 1)
        return values, columns
    covered = blocks * TOP_BLOCK
    maxima = x[:, :covered].view(rows, blocks, TOP_BLOCK).amax(2)
    chosen = maxima.topk(k, 1).indices  # (rows, k)
    columns = (chosen.unsqueeze(2) * TOP_BLOCK + torch.arange(TOP_BLOCK, device=x.device)).flatten(1)
    rest = torch.arange(covered, width, device=x.device).expand(rows, -1)
    columns = torch.cat((columns, rest), 1)
    values, found = x.gather(1, columns).topk(k, 1)
    return values, columns.gather(1, found)


def draw(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Token of each row of weights (rows, vocab) where the cumulative share passes the row's number in (0, 1).

    A row without weights gives some token of the vocabulary: others look it up before anybody knows that it is none.
    """
    rows, vocab = weights.shape
    whole = vocab // BLOCK * BLOCK
    sums = weights[:, :whole].view(rows, -1, BLOCK).sum(2) if whole else weights.new_empty(rows, 0)
    sums = torch.cat((sums, weights[:, whole:].sum(1, keepdim=True)), 1).double()  # (rows, blocks)
    below = sums.cumsum(1)
    target = numbers.unsqueeze(1) * below[:, -1:]  # (rows, 1)
    block = torch.searchsorted(below, target, right=True).clamp_(max=sums.shape[1] - 1)
    target -= below.gather(1, block) - sums.gather(1, block)  # what is left inside the block
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)  # (rows, BLOCK)
    inside = weights.gather(1, columns.clamp(max=vocab - 1)) * (columns < vocab)
    passed = (inside.cumsum(1, dtype=torch.float64) > target) & (inside > 0)
    # Rounding may leave the target just beyond the block's sum; its last possible token is meant then.
    last = BLOCK - 1 - (inside > 0).flip(1).to(torch.uint8).argmax(1)
    offset = torch.where(passed.any(1), passed.to(torch.uint8).argmax(1), last)
    return columns.gather(1, offset.unsqueeze(1)).squeeze(1).clamp_(max=vocab - 1)
