"""A mixture of experts for batches: (token, expert) pairs grouped by expert, then one product per group.

    align_experts  ids → pairs by expert, each expert's padded to whole blocks, and which expert a block belongs to
    expert_gemm    a block of pairs times rows of its expert's weights
    expert_sum     each token's experts, weighted, in the order of their choice

Pairs are numbered token * top_k + place. Their order within an expert is that of the tokens, so a result does not
depend on which program came first.
"""

from functools import partial

import torch
import triton.language as tl

from quartet.kernels.triton.common import activate, blocks, options, power_of_two
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import tile


def align_experts(
    ids: torch.Tensor, experts: int, block: int, pairs: torch.Tensor, block_experts: torch.Tensor
) -> None:
    """See kernels.operations.Ops.align_experts."""
    chosen = tile("align")
    assert len(pairs) >= len(block_experts) * block, (len(pairs), len(block_experts), block)
    _align_experts[(experts,)](
        ids,
        pairs,
        block_experts,
        ids.numel(),
        len(block_experts),
        experts,
        power_of_two(experts + 1),
        block,
        chosen.columns,
        **options(chosen),
    )


def most_blocks(pairs: int, experts: int, block: int) -> int:
    """Blocks that are enough, however the pairs are spread over the experts."""
    return min(pairs, pairs // block + experts)


def expert_gemm(
    x: torch.Tensor,
    pairs: torch.Tensor,
    block_experts: torch.Tensor,
    block: int,
    weight: torch.Tensor,
    activation: str | None,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.expert_gemm."""
    chosen = tile("expert_gemm_wide" if block >= 64 else "expert_gemm")
    total, size = out.shape
    _expert_gemm[(len(block_experts), blocks(size, chosen.rows))](
        x,
        pairs,
        block_experts,
        weight,
        out,
        total,
        total // len(x),
        size,
        x.shape[1],
        block,
        chosen.rows,
        chosen.columns,
        activation,
        **options(chosen),
    )


def expert_sum(
    y: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    shared_logits: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.expert_sum."""
    chosen = tile("expert_sum")
    tokens, hidden = out.shape
    _expert_sum[(tokens, blocks(hidden, chosen.columns))](
        y,
        weights,
        shared,
        shared_logits,
        residual,
        out,
        weights.stride(0),
        len(y) // tokens,
        hidden,
        chosen.columns,
        **options(chosen),
    )


@partial(kernel, do_not_specialize=["block_count"])
def _align_experts(
    ids_ptr,
    pairs_ptr,
    block_experts_ptr,
    total,
    block_count,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per expert: each counts all pairs, then places its own."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, total, CHUNK):
        places = first + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + places, places < total, EXPERTS)
        counts += tl.histogram(ids, BINS)
    counts = tl.where(bins < EXPERTS, counts, 0)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    start = tl.sum(tl.where(bins < expert, padded, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    own_blocks = (count + BLOCK - 1) // BLOCK

    placed = 0
    for first in range(0, total, CHUNK):
        places = first + tl.arange(0, CHUNK)
        mine = tl.load(ids_ptr + places, places < total, EXPERTS) == expert
        ranks = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(pairs_ptr + start + placed + ranks - 1, places, mine)
        placed += tl.sum(mine.to(tl.int32), 0)
    tail = count + tl.arange(0, BLOCK)
    tl.store(pairs_ptr + start + tail, tl.zeros((BLOCK,), tl.int32) + total, tail < own_blocks * BLOCK)
    for first in range(0, own_blocks, CHUNK):
        places = first + tl.arange(0, CHUNK)
        tl.store(
            block_experts_ptr + start // BLOCK + places, expert + tl.zeros((CHUNK,), tl.int32), places < own_blocks
        )
    if expert == 0:
        for first in range(tl.sum(padded, 0) // BLOCK, block_count, CHUNK):
            places = first + tl.arange(0, CHUNK)
            tl.store(block_experts_ptr + places, tl.full((CHUNK,), -1, tl.int32), places < block_count)


@partial(kernel, do_not_specialize=["total"])
def _expert_gemm(
    x_ptr,
    pairs_ptr,
    block_experts_ptr,
    weight_ptr,
    out_ptr,
    total,
    pairs_per_row,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    GATED: tl.constexpr = ACTIVATION is not None
    expert = tl.load(block_experts_ptr + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    pairs = tl.load(pairs_ptr + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))
    present = pairs < total
    x_rows = x_ptr + (pairs // pairs_per_row).to(tl.int64) * COLUMNS
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = rows < SIZE
    own_weight_ptr = weight_ptr + expert * (2 if GATED else 1) * SIZE * COLUMNS
    weight_rows = own_weight_ptr + rows[:, None] * COLUMNS
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    up_sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        summed = columns < COLUMNS
        x = tl.load(x_rows[None, :] + columns[:, None], summed[:, None] & present[None, :], 0.0)
        mask = within[:, None] & summed[None, :]
        sums = tl.dot(tl.load(weight_rows + columns[None, :], mask, 0.0), x, sums, input_precision="ieee")
        if GATED:
            up = tl.load(weight_rows + (SIZE * COLUMNS + columns)[None, :], mask, 0.0)
            up_sums = tl.dot(up, x, up_sums, input_precision="ieee")
    y = activate(sums, ACTIVATION) * up_sums if GATED else sums
    place = pairs.to(tl.int64)[None, :] * SIZE + rows[:, None]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), within[:, None] & present[None, :])


@kernel
def _expert_sum(
    y_ptr,
    weights_ptr,
    shared_ptr,
    shared_logits_ptr,
    residual_ptr,
    out_ptr,
    weights_stride,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    sums = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(TOP_K):
        y = tl.load(y_ptr + (token * TOP_K + place) * HIDDEN + columns, mask, 0.0).to(tl.float32)
        sums += y * tl.load(weights_ptr + token * weights_stride + place)
    if shared_ptr is not None:
        y = tl.load(shared_ptr + token * HIDDEN + columns, mask, 0.0).to(tl.float32)
        sums += y * tl.sigmoid(tl.load(shared_logits_ptr + token).to(tl.float32))
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + token * HIDDEN + columns, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + columns, sums.to(out_ptr.dtype.element_ty), mask)
