"""Sampling for batches that want more than a temperature: adjusting logits, and top-k, top-p and min-p before the draw.

No row is ever sorted. A filter's floor, the smallest weight that stays, is searched among the bit patterns of float32,
which are in the order of the weights: one pass over the row finds 16 intervals and the one that holds the floor, a
second gathers that interval's weights, and the rest of the search reads those few alone.
"""

import torch
import triton
import triton.language as tl

from quartet.kernels.triton.common import NEGATIVE_INFINITY, blocks, options, power_of_two
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import tile
from quartet.kernels.triton.draw import first_beyond, pick, store_choice, tile_facts, uniform

PIVOTS = tl.constexpr(16)
BITS_OF_ONE = tl.constexpr(0x3F800000)  # weights are relative to the largest, which is 1


def process_logits(
    logits: torch.Tensor,
    allowed: torch.Tensor | None,
    temperatures: torch.Tensor,
    tops: torch.Tensor,
    masses: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.process_logits."""
    chosen = tile("logits")
    rows, vocab = logits.shape
    _process_logits[(rows, blocks(vocab, chosen.columns))](
        logits,
        allowed,
        temperatures,
        tops,
        masses,
        vocab,
        chosen.columns,
        **options(chosen),
    )


def select(
    logits: torch.Tensor,
    tops: torch.Tensor,
    masses: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    candidates: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.select."""
    chosen = tile("select")
    rows, vocab = logits.shape
    tiles = blocks(vocab, tile("logits").columns)
    _select[(rows,)](
        logits,
        tops,
        masses,
        temperatures,
        top_ks,
        top_ps,
        min_ps,
        seeds,
        positions,
        candidates,
        tokens,
        valid,
        vocab,
        tiles,
        power_of_two(tiles),
        tile("logits").columns,
        chosen.columns,
        **options(chosen),
    )


@triton.jit
def is_allowed(allowed_ptr, row, tokens, mask, VOCAB: tl.constexpr):
    """A row's bits of these tokens."""
    words = (VOCAB + 31) // 32
    word = tl.load(allowed_ptr + row * words + tokens // 32, mask, 0)
    return ((word >> (tokens % 32)) & 1) != 0


@kernel
def _process_logits(
    logits_ptr,
    allowed_ptr,
    temperatures_ptr,
    tops_ptr,
    masses_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = tokens < VOCAB
    place = row.to(tl.int64) * VOCAB + tokens
    logits = tl.load(logits_ptr + place, mask, NEGATIVE_INFINITY)
    if allowed_ptr is not None:
        logits = tl.where(is_allowed(allowed_ptr, row, tokens, mask, VOCAB), logits, NEGATIVE_INFINITY)
    temperature = tl.load(temperatures_ptr + row)
    logits = logits / tl.where(temperature == 0.0, 1.0, temperature)
    tl.store(logits_ptr + place, logits, mask)
    top, mass = tile_facts(tl.where(mask, logits, NEGATIVE_INFINITY), mask)
    tile = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops_ptr + tile, top)
    tl.store(masses_ptr + tile, mass)


@triton.jit
def load_weights_of(logits_ptr, best, first, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """exp(logit - best) of a block of tokens; what is beyond the vocabulary has no weight and is not counted."""
    tokens = first + tl.arange(0, BLOCK)
    known = tokens < VOCAB
    return tl.exp(tl.load(logits_ptr + tokens, known, NEGATIVE_INFINITY) - best), known


@triton.jit
def at_least(bits, present, pivots, BY_MASS: tl.constexpr):
    """For each pivot the number of bit patterns that are not below it, or their mass as weights: float64 (PIVOTS,)."""
    reaches = (bits[None, :] >= pivots[:, None]) & present[None, :]
    if BY_MASS:
        weights = bits.to(tl.float32, bitcast=True)
        return tl.sum(tl.where(reaches, weights[None, :], 0.0), 1).to(tl.float64)
    else:  # noqa: RET505  (decided when compiled)
        return tl.sum(reaches.to(tl.int32), 1).to(tl.float64)


@triton.jit
def find_floor(
    logits_ptr, candidates_ptr, best, wanted, VOCAB: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr
):
    """The largest bit pattern with at least `wanted` weights (or `wanted` mass) at and above it."""
    numbers = tl.arange(0, PIVOTS) + 1
    step = BITS_OF_ONE // PIVOTS
    pivots = numbers * step
    reached = tl.zeros((PIVOTS,), tl.float64)
    for first in range(0, VOCAB, BLOCK):
        weights, known = load_weights_of(logits_ptr, best, first, VOCAB, BLOCK)
        reached += at_least(weights.to(tl.int32, bitcast=True), known, pivots, BY_MASS)
    passed = tl.sum((reached >= wanted).to(tl.int32), 0)
    low = passed * step
    high = tl.where(passed == PIVOTS, low, low + step - 1)  # the floor is in [low, high]
    above = tl.sum(tl.where(numbers == passed + 1, reached, 0.0), 0)  # beyond it

    tl.debug_barrier()  # an earlier search may still be reading
    count = 0
    for first in range(0, VOCAB, BLOCK):
        weights, known = load_weights_of(logits_ptr, best, first, VOCAB, BLOCK)
        bits = weights.to(tl.int32, bitcast=True)
        inside = known & (bits >= low) & (bits <= high)
        ranks = tl.cumsum(inside.to(tl.int32), 0)
        tl.store(candidates_ptr + count + ranks - 1, bits, inside)
        count += tl.sum(inside.to(tl.int32), 0)
    tl.debug_barrier()  # stores of all threads come before the loads

    while low < high:
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = low + numbers * step
        reached = tl.zeros((PIVOTS,), tl.float64) + above
        for first in range(0, count, BLOCK):
            places = first + tl.arange(0, BLOCK)
            present = places < count
            bits = tl.load(candidates_ptr + places, present, 0, cache_modifier=".cg")
            reached += at_least(bits, present, pivots, BY_MASS)
        passed = tl.sum(((reached >= wanted) & (pivots <= high)).to(tl.int32), 0)
        low = low + passed * step
        high = tl.minimum(low + step - 1, high)
    return low


@kernel
def _select(
    logits_ptr,
    tops_ptr,
    masses_ptr,
    temperatures_ptr,
    top_ks_ptr,
    top_ps_ptr,
    min_ps_ptr,
    seeds_ptr,
    positions_ptr,
    candidates_ptr,
    tokens_ptr,
    valid_ptr,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    own_logits_ptr = logits_ptr + row.to(tl.int64) * VOCAB
    temperature = tl.load(temperatures_ptr + row)
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    token, valid = pick(
        own_logits_ptr, tops_ptr + row * TILES, masses_ptr + row * TILES, temperature, seed, position,
        VOCAB, TILES, BLOCK_TILES, TILE,
    )  # fmt: skip
    top_k = tl.load(top_ks_ptr + row)
    top_p = tl.load(top_ps_ptr + row).to(tl.float64)
    min_p = tl.load(min_ps_ptr + row)
    by_count = (top_k > 0) & (top_k < VOCAB)
    by_mass = top_p < 1.0
    if valid & (temperature != 0.0) & (by_count | by_mass | (min_p > 0.0)):
        tiles = tl.arange(0, BLOCK_TILES)
        tops = tl.load(tops_ptr + row * TILES + tiles, tiles < TILES, NEGATIVE_INFINITY)
        masses = tl.load(masses_ptr + row * TILES + tiles, tiles < TILES, 0.0)
        best = tl.max(tops, 0)
        total = tl.sum((masses * tl.exp(tops - best)).to(tl.float64), 0)
        own_candidates_ptr = candidates_ptr + row.to(tl.int64) * VOCAB
        floor = min_p.to(tl.float32).to(tl.int32, bitcast=True)
        if by_count:
            wanted = top_k.to(tl.float64)
            floor = tl.maximum(floor, find_floor(own_logits_ptr, own_candidates_ptr, best, wanted, VOCAB, BLOCK, False))
        if by_mass:
            wanted = top_p * total
            floor = tl.maximum(floor, find_floor(own_logits_ptr, own_candidates_ptr, best, wanted, VOCAB, BLOCK, True))

        kept = total * 0.0
        for first in range(0, VOCAB, BLOCK):
            weights, _ = load_weights_of(own_logits_ptr, best, first, VOCAB, BLOCK)
            stays = weights.to(tl.int32, bitcast=True) >= floor
            kept += tl.sum(tl.where(stays, weights, 0.0).to(tl.float64), 0)
        left = uniform(seed, position) * kept
        token = -1
        first = 0
        offsets = tl.arange(0, BLOCK)
        while (token < 0) & (first < VOCAB):
            weights, _ = load_weights_of(own_logits_ptr, best, first, VOCAB, BLOCK)
            stays = weights.to(tl.int32, bitcast=True) >= floor
            weights = tl.where(stays, weights, 0.0).to(tl.float64)
            sum_here = tl.sum(weights, 0)
            # The last block with any weight takes what rounding left over.
            kept -= sum_here
            if (sum_here > left) | ((sum_here > 0) & (kept <= sum_here * 1e-12)):
                place, _before = first_beyond(weights, left, offsets, BLOCK)
                token = first + place
            left -= sum_here
            first += BLOCK
        token = tl.where(token < 0, 0, token)
    store_choice(token, valid, row, None, tokens_ptr, valid_ptr)
