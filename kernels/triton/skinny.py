"""Products of few tokens with a weight matrix on the tensor cores.

The weights are the wide side of the product (64 rows of one instruction) and the tokens the narrow one, padded to 16,
32 or 64; more tokens come in blocks of 64. The summed dimension is split by the shape of the matrix, never by the
number of tokens; the last split of a tile to end adds the parts up in their order and finishes.

With blocks of one and the same size (`block`) a token's result is the same, bit for bit, whatever the others are.
"""

from functools import partial

import torch
import triton.language as tl

from quartet.kernels.triton.common import activate, blocks, comes_last, options, power_of_two
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import MULTIPROCESSORS, SKINNY_ROWS, Tile, tile

LEAST_TOKENS = 16


def skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partials: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    block: int | None = None,
) -> None:
    """See kernels.operations.Ops.skinny."""
    launch(tile("skinny"), x, weight, bias, residual, partials, counters, out, None, block)


def skinny_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    partials: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    block: int | None = None,
) -> None:
    """See kernels.operations.Ops.skinny_gated."""
    launch(tile("skinny_gated"), x, weight, bias, None, partials, counters, out, activation, block)


def launch(
    chosen: Tile,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partials: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    activation: str | None,
    block: int | None,
) -> None:
    """Launch the kernel of `skinny`, or with an activation that of `skinny_gated`."""
    tokens, columns = x.shape
    size = out.shape[1]
    splits = split_count(chosen, size, columns)
    block = block or block_of(tokens)
    _skinny[(blocks(tokens, block), blocks(size, chosen.rows), splits)](
        x,
        weight,
        bias,
        residual,
        partials,
        counters,
        out,
        tokens,
        size,
        columns,
        block,
        chosen.rows,
        chosen.columns,
        splits,
        blocks(blocks(columns, chosen.columns), splits) * chosen.columns,
        activation,
        **options(chosen),
    )


def block_of(tokens: int) -> int:
    """Tokens of one program."""
    return min(SKINNY_ROWS, max(LEAST_TOKENS, power_of_two(tokens)))


def split_count(chosen: Tile, size: int, columns: int) -> int:
    """Enough splits for two programs on each multiprocessor; a fact of the matrix, whatever the number of tokens."""
    wanted = 2 * MULTIPROCESSORS // blocks(size, chosen.rows)
    return max(1, min(wanted, chosen.splits, blocks(columns, chosen.columns)))


def skinny_workspace(tokens: int, size: int, columns: int, gated: bool, block: int | None = None) -> tuple[int, int]:
    """Elements of the partials and of the counters for a product of (tokens, columns) that gives (tokens, size)."""
    chosen = tile("skinny_gated" if gated else "skinny")
    block = block or block_of(tokens)
    tiles = blocks(size, chosen.rows) * blocks(tokens, block)
    return split_count(chosen, size, columns) * (2 if gated else 1) * tiles * chosen.rows * block, tiles


@partial(kernel, do_not_specialize=["token_count"])
def _skinny(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    partials_ptr,
    counters_ptr,
    out_ptr,
    token_count,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    GATED: tl.constexpr = ACTIVATION is not None
    # Blocks of tokens come first in the grid: they read the same weights, so they run side by side.
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    split = tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = rows < SIZE
    columns_of_block = tl.arange(0, TOKENS)
    tokens = tl.program_id(0) * TOKENS + columns_of_block
    present = tokens < token_count
    weight_rows = weight_ptr + rows.to(tl.int64)[:, None] * COLUMNS
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    up_sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(split * SPLIT_COLUMNS, tl.minimum((split + 1) * SPLIT_COLUMNS, COLUMNS), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        summed = columns < COLUMNS
        x = tl.load(x_ptr + tokens[None, :] * COLUMNS + columns[:, None], summed[:, None] & present[None, :], 0.0)
        mask = within[:, None] & summed[None, :]
        weights = tl.load(weight_rows + columns[None, :], mask, 0.0, eviction_policy="evict_first")
        sums = tl.dot(weights, x, sums, input_precision="ieee")
        if GATED:
            weights = tl.load(
                weight_rows + (SIZE * COLUMNS + columns)[None, :], mask, 0.0, eviction_policy="evict_first"
            )
            up_sums = tl.dot(weights, x, up_sums, input_precision="ieee")

    if SPLITS > 1:
        # Partials are (tiles, splits, one or two, rows, tokens).
        KINDS: tl.constexpr = 2 if GATED else 1
        PART: tl.constexpr = KINDS * ROWS * TOKENS
        cells = tl.arange(0, ROWS)[:, None] * TOKENS + columns_of_block[None, :]
        parts = partials_ptr + block * SPLITS * PART + cells
        tl.store(parts + split * PART, sums)
        if GATED:
            tl.store(parts + split * PART + ROWS * TOKENS, up_sums)
        if not comes_last(counters_ptr + block, SPLITS):
            return
        sums = tl.zeros((ROWS, TOKENS), tl.float32)
        up_sums = tl.zeros((ROWS, TOKENS), tl.float32)
        for other in tl.static_range(SPLITS):
            sums += tl.load(parts + other * PART, cache_modifier=".cg")
            if GATED:
                up_sums += tl.load(parts + other * PART + ROWS * TOKENS, cache_modifier=".cg")

    y = sums
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, within, 0.0).to(tl.float32)[:, None]
    if GATED:
        if bias_ptr is not None:
            up_sums += tl.load(bias_ptr + SIZE + rows, within, 0.0).to(tl.float32)[:, None]
        y = activate(y, ACTIVATION) * up_sums
    place = tokens[None, :] * SIZE + rows[:, None]
    mask = within[:, None] & present[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + place, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask)
