"""From hidden states to tokens in one launch, for batches that want nothing but a temperature.

A program makes the logits of 64 tokens for all rows, and the two numbers that `pick` needs of them. For a few rows the
last program to end picks; for more, a second launch does, one program per row.
"""

from functools import partial

import torch
import triton.language as tl

from quartet.kernels.triton.common import (
    NEGATIVE_INFINITY,
    blocks,
    comes_last,
    options,
    power_of_two,
    scale_of_norm,
    tanh,
)
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import FEW_ROWS, SKINNY_ROWS, tile
from quartet.kernels.triton.draw import pick, store_choice

LEAST_ROWS = 16


def lm_head_sample(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    weight: torch.Tensor,
    softcap: float | None,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor | None,
    logits: torch.Tensor,
    tops: torch.Tensor,
    masses: torch.Tensor,
    counter: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.lm_head_sample."""
    chosen = tile("lm_head")
    rows, columns = x.shape
    assert rows <= SKINNY_ROWS, rows
    vocab = len(weight)
    tiles = blocks(vocab, chosen.rows)
    _lm_head[(tiles,)](
        x,
        norm_weight,
        epsilon,
        weight,
        temperatures,
        seeds,
        positions,
        slots,
        logits,
        tops,
        masses,
        counter,
        tokens,
        valid,
        0.0 if softcap is None else softcap,
        rows,
        softcap is not None,
        vocab,
        columns,
        max(LEAST_ROWS, power_of_two(rows)),
        chosen.rows,
        chosen.columns,
        tiles,
        power_of_two(tiles),
        plus_one,
        rows <= FEW_ROWS,
        **options(chosen),
    )
    if rows > FEW_ROWS:
        draw(logits, tops, masses, chosen.rows, temperatures, seeds, positions, slots, tokens, valid)


def draw(
    logits: torch.Tensor,
    tops: torch.Tensor,
    masses: torch.Tensor,
    block: int,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor | None,
    tokens: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.draw."""
    rows, vocab = logits.shape
    tiles = blocks(vocab, block)
    _draw[(rows,)](
        logits,
        tops,
        masses,
        temperatures,
        seeds,
        positions,
        slots,
        tokens,
        valid,
        vocab,
        tiles,
        power_of_two(tiles),
        block,
        **options(tile("lm_head")),
    )


@kernel
def _draw(
    logits_ptr,
    tops_ptr,
    masses_ptr,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    slots_ptr,
    tokens_ptr,
    valid_ptr,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    token, valid = pick(
        logits_ptr + row.to(tl.int64) * VOCAB, tops_ptr + row * TILES, masses_ptr + row * TILES,
        tl.load(temperatures_ptr + row), tl.load(seeds_ptr + row), tl.load(positions_ptr + row),
        VOCAB, TILES, BLOCK_TILES, BLOCK,
    )  # fmt: skip
    store_choice(token, valid, row, slots_ptr, tokens_ptr, valid_ptr)


@partial(kernel, do_not_specialize_on_alignment=["row_count"])
def _lm_head(
    x_ptr,
    norm_ptr,
    epsilon,
    weight_ptr,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    slots_ptr,
    logits_ptr,
    tops_ptr,
    masses_ptr,
    counter_ptr,
    tokens_ptr,
    valid_ptr,
    softcap,
    row_count,
    SOFTCAP: tl.constexpr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    LAST_PICKS: tl.constexpr,
):
    tile = tl.program_id(0)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    known = tokens < VOCAB
    rows = tl.arange(0, ROWS)
    present = rows < row_count
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    inverse = tl.full((ROWS,), 1.0, tl.float32)
    if norm_ptr is not None:
        squares = tl.zeros((ROWS,), tl.float32)
        for first in range(0, COLUMNS, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            mask = present[:, None] & (columns < COLUMNS)[None, :]
            x = tl.load(x_ptr + rows[:, None] * COLUMNS + columns[None, :], mask, 0.0).to(tl.float32)
            squares += tl.sum(x * x, 1)
        inverse = tl.rsqrt(squares / COLUMNS + epsilon)
    for first in range(0, COLUMNS, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        within = columns < COLUMNS
        x = tl.load(x_ptr + rows[None, :] * COLUMNS + columns[:, None], within[:, None] & present[None, :], 0.0)
        if norm_ptr is not None:
            scale = scale_of_norm(norm_ptr, columns, within, PLUS_ONE)
            x = (x.to(tl.float32) * inverse[None, :] * scale[:, None]).to(weight_ptr.dtype.element_ty)
        place = tokens.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        mask = known[:, None] & within[None, :]
        weights = tl.load(weight_ptr + place, mask, 0.0, eviction_policy="evict_first")
        sums = tl.dot(weights, x, sums, input_precision="ieee")
    if SOFTCAP:
        sums = softcap * tanh(sums / softcap)
    cells = known[:, None] & present[None, :]
    temperatures = tl.load(temperatures_ptr + rows, present, 0.0)
    sums = sums / tl.where(temperatures == 0.0, 1.0, temperatures)[None, :]
    tl.store(logits_ptr + rows.to(tl.int64)[None, :] * VOCAB + tokens[:, None], sums, cells)

    sums = tl.where(known[:, None], sums, NEGATIVE_INFINITY)
    largest = tl.max(sums, 0)
    origin = tl.where(largest == NEGATIVE_INFINITY, 0.0, largest)
    masses = tl.sum(tl.where(known[:, None], tl.exp(sums - origin[None, :]), 0.0), 0)
    has_nan = tl.max((sums != sums).to(tl.int32), 0)
    tl.store(tops_ptr + rows * TILES + tile, tl.where(has_nan > 0, float("nan"), largest), present)
    tl.store(masses_ptr + rows * TILES + tile, masses, present)
    if LAST_PICKS:
        if not comes_last(counter_ptr, TILES):
            return
        for row in range(row_count):
            token, valid = pick(
                logits_ptr + row * VOCAB, tops_ptr + row * TILES, masses_ptr + row * TILES,
                tl.load(temperatures_ptr + row), tl.load(seeds_ptr + row), tl.load(positions_ptr + row),
                VOCAB, TILES, BLOCK_TILES, TOKENS,
            )  # fmt: skip
            store_choice(token, valid, row, slots_ptr, tokens_ptr, valid_ptr)
