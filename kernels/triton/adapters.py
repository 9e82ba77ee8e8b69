"""What LoRA adapters add to products: a shrink to their ranks and an expand from them, each by tiles of one adapter.

A tile is at most 16 tokens of one adapter, the narrow side of a product on the tensor cores; the adapter's ranks, or
the columns of the result, are the wide one. Where the tokens of a tile are is read on the device, and tiles without
tokens end at once: so a graph has as many as a step may need. Ranks that an adapter does not have are neither read nor
written. Each sum is made by one program in one order, so a token's result does not depend on the other tokens, nor on
its place in a tile.
"""

from functools import partial

import torch
import triton.language as tl

from quartet.kernels.reference.adapters import TILE_TOKENS
from quartet.kernels.triton.common import blocks, options, power_of_two
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import tile


def adapter_shrink(
    x: torch.Tensor, a: torch.Tensor, tiles: torch.Tensor, order: torch.Tensor, out: torch.Tensor
) -> None:
    """See kernels.operations.Ops.adapter_shrink."""
    chosen = tile("adapter_shrink")
    _, parts, rank, columns = a.shape
    ranks = parts * rank
    assert x.is_contiguous() and a.is_contiguous() and out.shape[1] == ranks, (x.shape, a.shape, out.shape)
    _shrink[(len(tiles), blocks(ranks, chosen.rows))](
        x,
        a,
        tiles,
        order,
        out,
        ranks,
        rank,
        columns,
        len(out) // len(x),
        TILE_TOKENS,
        chosen.rows,
        chosen.columns,
        **options(chosen),
    )


def adapter_expand(
    x: torch.Tensor,
    first: int,
    b: torch.Tensor,
    tiles: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    column: int,
) -> None:
    """See kernels.operations.Ops.adapter_expand."""
    chosen = tile("adapter_expand")
    _, columns, rank = b.shape
    assert b.is_contiguous() and first + rank <= x.shape[1] and column + columns <= out.shape[1], (b.shape, x.shape)
    _expand[(len(tiles), blocks(columns, chosen.rows))](
        x,
        b,
        tiles,
        order,
        out,
        first,
        column,
        x.stride(0),
        out.stride(0),
        columns,
        rank,
        TILE_TOKENS,
        chosen.rows,
        max(16, min(chosen.columns, power_of_two(rank))),
        **options(chosen),
    )


@kernel
def _shrink(
    x_ptr,
    a_ptr,
    tiles_ptr,
    order_ptr,
    out_ptr,
    RANKS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    count, own_rank = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    idle = count == 0
    if RANK % ROWS == 0:  # then all ranks of a program are of one part
        idle = idle | (tl.program_id(1) * ROWS % RANK >= own_rank)
    if idle:
        return
    slot = tl.load(tile_ptr).to(tl.int64)
    places = tl.arange(0, TOKENS)
    present = places < count
    tokens = tl.load(order_ptr + tl.load(tile_ptr + 1) + places, present, 0).to(tl.int64)
    ranks = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = (ranks < RANKS) & (ranks % RANK < own_rank)
    factor = a_ptr + (slot * RANKS + ranks)[:, None] * COLUMNS
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for begin in range(0, COLUMNS, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        summed = columns < COLUMNS
        x = tl.load(
            x_ptr + (tokens // SHARED)[None, :] * COLUMNS + columns[:, None], summed[:, None] & present[None, :], 0.0
        )
        weights = tl.load(factor + columns[None, :], within[:, None] & summed[None, :], 0.0)
        sums = tl.dot(weights, x, sums, input_precision="ieee")
    place = tokens[None, :] * RANKS + ranks[:, None]
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), within[:, None] & present[None, :])


@partial(kernel, do_not_specialize=["first", "column"])
def _expand(
    x_ptr,
    b_ptr,
    tiles_ptr,
    order_ptr,
    out_ptr,
    first,
    column,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    count, own_rank = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    if count == 0:
        return
    slot = tl.load(tile_ptr).to(tl.int64)
    places = tl.arange(0, TOKENS)
    present = places < count
    tokens = tl.load(order_ptr + tl.load(tile_ptr + 1) + places, present, 0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = rows < COLUMNS
    factor = b_ptr + (slot * COLUMNS + rows)[:, None] * RANK
    inner = x_ptr + tokens[None, :] * X_STRIDE + first
    read_rank = (own_rank + 15) // 16 * 16  # whole vectors; beyond `own_rank` x counts as zero
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for begin in range(0, RANK, BLOCK):
        ranks = begin + tl.arange(0, BLOCK)
        x = tl.load(inner + ranks[:, None], (ranks < own_rank)[:, None] & present[None, :], 0.0)
        summed = (ranks < RANK) & (ranks < read_rank)
        weights = tl.load(factor + ranks[None, :], within[:, None] & summed[None, :], 0.0)
        sums = tl.dot(weights, x, sums, input_precision="ieee")
    place = out_ptr + tokens[None, :] * OUT_STRIDE + column + rows[:, None]
    mask = within[:, None] & present[None, :]
    y = tl.load(place, mask, 0.0).to(tl.float32) + sums
    tl.store(place, y.to(out_ptr.dtype.element_ty), mask)
