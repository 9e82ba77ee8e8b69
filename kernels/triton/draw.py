"""The draw itself, for kernels that choose tokens: a number from the counter-based generator, and where it falls.

Logits come with two numbers per tile of `BLOCK` tokens: the tile's largest logit (NaN if it has a NaN) and the sum of
exp(logit - largest). The token is where the cumulative share, in vocabulary order, passes the row's number: first among
the tiles, then inside one. A temperature of 0 asks for the first largest logit.
"""

import triton
import triton.language as tl

from quartet.kernels.triton.common import NEGATIVE_INFINITY


@triton.jit
def uniform(seed, position):
    """The number in (0, 1) of kernels/reference/philox.py for one row, float64."""
    word, _, _, _ = tl.philox(seed, 0, position.to(tl.uint32), 0, 0)
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def tile_facts(logits, mask):
    """Largest of a tile's logits (padded with minus infinity), NaN if there is one, and sum of exp(logit - largest)."""
    has_nan = tl.max((logits != logits).to(tl.int32), 0)
    largest = tl.max(logits, 0)
    origin = tl.where(largest == NEGATIVE_INFINITY, 0.0, largest)
    mass = tl.sum(tl.where(mask, tl.exp(logits - origin), 0.0), 0)
    return tl.where(has_nan > 0, float("nan"), largest), mass


@triton.jit
def first_beyond(masses, target, places, COUNT: tl.constexpr):
    """The first place whose cumulative mass (float64) passes the target, and the mass before it.

    Rounding may leave the target just beyond the sum; the last place with any mass is meant then.
    """
    cumulative = tl.cumsum(masses, 0)
    passed = (cumulative > target) & (masses > 0)
    last = tl.max(tl.where(masses > 0, places, 0), 0)
    place = tl.min(tl.where(passed, places, COUNT), 0)
    place = tl.where(place == COUNT, last, place)
    before = tl.sum(tl.where(places < place, masses, 0.0), 0)
    return place, before


@triton.jit
def pick(
    logits_ptr,
    tops_ptr,
    masses_ptr,
    temperature,
    seed,
    position,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's token, and whether its largest logit was a finite number. Pointers are to the row."""
    tiles = tl.arange(0, BLOCK_TILES)
    mask = tiles < TILES
    tops = tl.load(tops_ptr + tiles, mask, NEGATIVE_INFINITY, cache_modifier=".cg")
    masses = tl.load(masses_ptr + tiles, mask, 0.0, cache_modifier=".cg")
    best = tl.max(tops, 0)
    has_nan = tl.max((tops != tops).to(tl.int32), 0)
    valid = (has_nan == 0) & (best > NEGATIVE_INFINITY) & (best < float("inf"))
    best = tl.where(valid, best, 0.0)

    weights = tl.where(valid & (masses > 0), masses * tl.exp(tops - best), 0.0).to(tl.float64)
    target = uniform(seed, position) * tl.sum(weights, 0)
    tile, before = first_beyond(weights, target, tiles, BLOCK_TILES)
    greedy = temperature == 0.0
    tile = tl.where(greedy, tl.min(tl.where(tops == best, tiles, TILES - 1), 0), tile)
    offsets = tl.arange(0, BLOCK)
    tokens = tile * BLOCK + offsets
    logits = tl.load(logits_ptr + tokens, tokens < VOCAB, NEGATIVE_INFINITY, cache_modifier=".cg")
    inside = tl.exp(logits - best).to(tl.float64)
    drawn, _ = first_beyond(inside, target - before, offsets, BLOCK)
    first_best = tl.min(tl.where(logits == best, offsets, BLOCK - 1), 0)
    token = tile * BLOCK + tl.where(greedy, first_best, drawn)
    return tl.minimum(token, VOCAB - 1), valid


@triton.jit
def store_choice(token, valid, row, slots_ptr, tokens_ptr, valid_ptr):
    """Into the row's own place, or its slot's (none below 0)."""
    place = row
    if slots_ptr is not None:
        place = tl.load(slots_ptr + row).to(tl.int32)
    if place >= 0:
        tl.store(tokens_ptr + place, token.to(tokens_ptr.dtype.element_ty))
    tl.store(valid_ptr + row, valid.to(tl.int32))
