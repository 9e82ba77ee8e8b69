"""From logits to tokens, vectorised over a batch of requests that each want something else.

Order of operations: penalties (frequency, presence, minimum length, repetition), logit bias, allowed-token mask,
temperature, then top-k, top-p and min-p on one and the same distribution, then the draw.

The draw is a pure function of (logits, parameters, seed, position): a uniform number from a counter-based generator
(key: the seed, counter: the position) picks the token by the inverse of the cumulative distribution, in vocabulary
order, first among blocks of `BLOCK` tokens, then inside the block. No row looks at another, so a request draws the
same tokens alone and in company, before and after a retraction. Greedy requests take the first largest logit.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from math import inf
from operator import or_

import numpy as np
import torch

from kernels.philox import uniform
from runtime.sampling import SamplingParams
from scheduler_service.core.request import Sequence
from scheduler_service.transfer import send, upload

BLOCK = 256  # tokens whose weights are summed first when drawing
TOP_BLOCK = 128  # tokens that compete through their largest when searching the top k
CACHE_ELEMENTS = 1 << 21  # weights that are worked on at once, so that they stay in the cache
BIN_SHIFT = 18  # bits dropped from a weight to find its bin: 32 bins for each power of two
BINS = (0x3F800000 >> BIN_SHIFT) + 1  # weights are at most 1.0


class Wish:
    """What a request asks of the sampler beyond a greedy choice; plain ints, for enums are slow to combine."""

    DRAW = 1
    TOP_K = 2
    TOP_P = 4
    MIN_P = 8
    PENALTY = 16
    MIN_LENGTH = 32
    BIAS = 64


@dataclass(slots=True)
class Draws:
    """What one call chose, on the device of the logits."""

    tokens: torch.Tensor  # (rows,) int64
    valid: torch.Tensor  # (rows,) bool; False: the row had no finite largest logit


@dataclass(slots=True)
class Row:
    """The sampler's state of one admitted request."""

    params: SamplingParams
    wish: int  # Wish values, or-ed
    seed: int
    prompt_len: int
    end_ids: list[int]  # ids that would end the request
    bias_ids: "array[int]"
    biases: "array[float]"
    counted: "array[int]" = field(default_factory=lambda: array("q"))  # distinct output tokens
    counts: "array[int]" = field(default_factory=lambda: array("q"))  # how often each occurred
    places: dict[int, int] = field(default_factory=dict)  # token → index into the two arrays

    def add(self, token: int) -> None:
        """Note an output token."""
        if self.wish & Wish.PENALTY:
            self.count((token,))

    def count(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            place = self.places.setdefault(token, len(self.counted))
            if place == len(self.counted):
                self.counted.append(token)
                self.counts.append(0)
            self.counts[place] += 1


def make_row(sequence: Sequence, eos_ids: list[int]) -> Row:
    """The state follows from the request and its tokens alone, so it is rebuilt after a retraction."""
    params = sequence.request.params
    bias = params.logit_bias or {}
    row = Row(
        params=params,
        wish=wish_of(params),
        seed=signed(sequence.request.seed),
        prompt_len=sequence.prompt_len,
        end_ids=sorted({*eos_ids, *(params.stop_token_ids or ())}),
        bias_ids=array("q", map(int, bias)),
        biases=array("f", bias.values()),
    )
    if row.wish & Wish.PENALTY:
        row.count(sequence.ids[sequence.prompt_len :])
    return row


def signed(seed: int) -> int:
    """The lowest 64 bits as an int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def wish_of(params: SamplingParams) -> int:
    penalised = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    wishes = {
        Wish.DRAW: not params.greedy,
        Wish.TOP_K: not params.greedy and params.top_k > 0,
        Wish.TOP_P: not params.greedy and params.top_p < 1.0,
        Wish.MIN_P: not params.greedy and params.min_p > 0.0,
        Wish.PENALTY: bool(penalised),
        Wish.MIN_LENGTH: params.min_new_tokens > 0,
        Wish.BIAS: bool(params.logit_bias),
    }
    return sum(wish for wish, wanted in wishes.items() if wanted)


def sample(
    logits: torch.Tensor,
    rows: list[Row],
    positions: list[int],
    allowed: torch.Tensor | None = None,
    keep_logits: bool = False,
) -> Draws:
    """One token per row of logits (rows, vocab), which are adjusted in place, and spoilt unless they are to be kept."""
    adjust(logits, rows, positions, allowed)
    return choose(logits, rows, positions, keep_logits)


# Adjusting the logits


def adjust(logits: torch.Tensor, rows: list[Row], positions: list[int], allowed: torch.Tensor | None = None) -> None:
    """Penalties, bias, allowed tokens and temperature, in place on logits (rows, vocab).

    `allowed` is a bit mask, int32 (rows, ceil(vocab / 32)): bit i % 32 of word i // 32 allows token i.
    """
    adjust_single_tokens(logits, rows, positions)
    if allowed is not None:
        logits.masked_fill_(unpack_bits(~allowed, logits.shape[1]), -inf)
    temperatures = [row.params.temperature if row.wish & Wish.DRAW else 1.0 for row in rows]
    if any(temperature != 1.0 for temperature in temperatures):
        logits.div_(upload(temperatures, logits.device).unsqueeze(1))


def adjust_single_tokens(logits: torch.Tensor, rows: list[Row], positions: list[int]) -> None:
    """What concerns a few tokens of some rows: penalties, the minimum length and bias."""
    wishes = reduce(or_, (row.wish for row in rows), 0)
    if wishes & Wish.PENALTY:
        penalise(logits, rows)
    if wishes & Wish.MIN_LENGTH:
        forbid_the_end(logits, rows, positions)
    if wishes & Wish.BIAS:
        add_bias(logits, rows)


def penalise(logits: torch.Tensor, rows: list[Row]) -> None:
    """Frequency and presence are subtracted, repetition scales, for tokens of the output."""
    vocab = logits.shape[1]
    where, counts, factors = [], [], []
    for i, row in enumerate(rows):
        if row.wish & Wish.PENALTY and row.counted:
            params = row.params
            where.append(torch.tensor(row.counted) + i * vocab)
            counts.append(torch.tensor(row.counts))
            factors.append((params.frequency_penalty, params.presence_penalty, params.repetition_penalty))
    if not where:
        return
    device = logits.device
    flat = send(torch.cat(where), device)
    lengths = torch.tensor([len(part) for part in where])
    frequency, presence, repetition = send(torch.tensor(factors).repeat_interleave(lengths, 0), device).unbind(1)
    values = logits.view(-1)[flat] - frequency * send(torch.cat(counts), device) - presence
    logits.view(-1)[flat] = torch.where(values > 0, values / repetition, values * repetition)


def forbid_the_end(logits: torch.Tensor, rows: list[Row], positions: list[int]) -> None:
    """Mask the ids that end a request which has not made its minimum of tokens."""
    for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
        if row.end_ids and position - row.prompt_len < row.params.min_new_tokens:
            logits[i, upload(row.end_ids, logits.device)] = -inf


def add_bias(logits: torch.Tensor, rows: list[Row]) -> None:
    for i, row in enumerate(rows):
        if row.bias_ids:
            logits[i, upload(row.bias_ids, logits.device)] += upload(row.biases, logits.device)


def unpack_bits(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """int32 (rows, words) → bool (rows, vocab), lowest bit first."""
    if words.device.type == "cpu":
        bytes_ = words.numpy().view(np.uint8)
        return torch.from_numpy(np.unpackbits(bytes_, axis=1, count=vocab, bitorder="little").view(np.bool_))
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(2) >> bits & 1).bool().flatten(1)[:, :vocab]


# Choosing the tokens


def choose(logits: torch.Tensor, rows: list[Row], positions: list[int], keep_logits: bool = False) -> Draws:
    """One token per row of adjusted logits (rows, vocab), which are overwritten unless they are to be kept."""
    best, tokens = logits.max(1)  # a NaN anywhere in a row makes its largest NaN
    valid = torch.isfinite(best)
    drawn = [i for i, row in enumerate(rows) if row.wish & Wish.DRAW]
    if drawn:
        seeds = torch.tensor([rows[i].seed for i in drawn])
        numbers = send(uniform(seeds, torch.tensor([positions[i] for i in drawn])), logits.device)
        at_once = max(1, CACHE_ELEMENTS // logits.shape[1])
        for first in range(0, len(drawn), at_once):
            some = drawn[first : first + at_once]
            picked = upload(some, logits.device)
            adjacent = some[-1] - some[0] == len(some) - 1
            own = logits[some[0] : some[-1] + 1] if adjacent and not keep_logits else logits[picked]
            weights = own.sub_(best[picked].unsqueeze(1)).exp_()
            if weights.device.type == "cpu" and not (usable := valid[picked]).all():
                weights[~usable] = 1.0  # NaN has no place in a histogram; on a GPU there is none
            filter_weights(weights, [rows[i] for i in some])
            tokens[picked] = draw(weights, numbers[first : first + at_once])
    return Draws(tokens, valid)


def filter_weights(weights: torch.Tensor, rows: list[Row]) -> None:
    """Zero what top-k, top-p and min-p leave out, in place. Weights are relative to each row's largest, which is 1."""
    floor = torch.zeros(len(rows), dtype=weights.dtype, device=weights.device)  # smallest weight that stays
    for wish, smallest in ((Wish.TOP_K, top_k_floor), (Wish.TOP_P, top_p_floor), (Wish.MIN_P, min_p_floor)):
        chosen = [i for i, row in enumerate(rows) if row.wish & wish]
        if not chosen:
            continue
        picked = upload(chosen, weights.device)
        part = weights if len(chosen) == len(rows) else weights[picked]
        floor[picked] = torch.maximum(floor[picked], smallest(part, [rows[i].params for i in chosen]))
    if (
        weights.device.type != "cpu" or floor.any()
    ):  # looking is cheaper than writing, unless a device must be waited for
        weights.masked_fill_(weights < floor.unsqueeze(1), 0.0)


def top_k_floor(weights: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The k-th largest weight of each row; tokens tied with it stay."""
    ks = [min(p.top_k, weights.shape[1]) for p in params]
    values, _ = largest(weights, max(ks))
    return values.gather(1, upload(ks, weights.device).unsqueeze(1) - 1).squeeze(1)


def top_p_floor(weights: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The smallest weight of the shortest list of best tokens whose share reaches p.

    A histogram over the leading bits of the weights shows in which bin that weight lies; only that bin is sorted.
    A vocabulary that is smaller than the histogram is sorted as a whole; so is any on a GPU, since how many weights
    lie in a bin is not known there without waiting.
    """
    shares = upload([p.top_p for p in params], weights.device, torch.float64)
    if weights.shape[1] <= BINS or weights.device.type != "cpu":
        values = weights.sort(1, descending=True).values
        mass = values.cumsum(1, dtype=torch.float64)
        place = torch.searchsorted(mass, shares.unsqueeze(1) * mass[:, -1:]).clamp_(max=weights.shape[1] - 1)
        return values.gather(1, place).squeeze(1)
    bins = weights.view(torch.int32) >> BIN_SHIFT  # (rows, vocab), in the order of the weights
    sums = weights.new_zeros(len(params), BINS).scatter_add_(1, bins.long(), weights)
    reached = sums.flip(1).cumsum(1, dtype=torch.float64)  # (rows, BINS), from the best bin on
    wanted = shares.unsqueeze(1) * reached[:, -1:]  # (rows, 1)
    place = torch.searchsorted(reached, wanted).clamp_(max=BINS - 1)
    border = BINS - 1 - place  # (rows, 1): the bin of the smallest weight that stays
    missing = wanted - reached.gather(1, place) + sums.gather(1, border)
    inside = bins == border
    return nth_by_mass(weights[inside], inside.sum(1), missing.squeeze(1))


def nth_by_mass(values: torch.Tensor, counts: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Values come in groups of `counts`; where does each group's sum, from its largest on, reach `wanted` (groups,)?"""
    ends = counts.cumsum(0)
    group = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts)
    order = values.argsort(descending=True)
    values = values[order[group[order].argsort(stable=True)]]  # by group, then from the largest on
    sums = torch.cat((wanted.new_zeros(1), values.cumsum(0, dtype=torch.float64)))
    first = torch.searchsorted(sums[1:], sums[ends - counts] + wanted)
    return values[torch.minimum(first, ends - 1)]


def min_p_floor(weights: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    return upload([p.min_p for p in params], weights.device, weights.dtype)


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
