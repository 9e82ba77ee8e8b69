"""Products of up to four tokens with a weight matrix: a pure stream of weights through the multiply-add units."""

import torch
import triton.language as tl

from quartet.kernels.triton.common import (
    activate,
    blocks,
    column_block,
    options,
    power_of_two,
    row_product_pairs,
    row_products,
    start_next_kernel,
)
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import FEW_ROWS, tile


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    dependent: bool = False,
) -> None:
    """See kernels.operations.Ops.gemv."""
    chosen = tile("gemv")
    tokens, columns = x.shape
    assert tokens <= FEW_ROWS, tokens
    rows = len(weight)
    _gemv[(blocks(rows, chosen.rows),)](
        x,
        weight,
        bias,
        residual,
        out,
        tokens,
        rows,
        columns,
        power_of_two(tokens),
        chosen.rows,
        column_block(chosen, columns, tokens),
        dependent,
        **options(chosen, dependent),
    )


def norm_gate_up(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
    *,
    dependent: bool = False,
) -> None:
    """See kernels.operations.Ops.norm_gate_up."""
    chosen = tile("gate_up")
    tokens, columns = x.shape
    assert tokens <= FEW_ROWS, tokens
    size = out.shape[1]
    _norm_gate_up[(blocks(size, chosen.rows),)](
        x,
        norm_weight,
        epsilon,
        weight,
        bias,
        out,
        tokens,
        size,
        columns,
        power_of_two(tokens),
        chosen.rows,
        column_block(chosen, columns, tokens),
        plus_one,
        activation,
        dependent,
        **options(chosen, dependent),
    )


@kernel
def _gemv(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    token_count,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_next_kernel(DEPENDENT)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < SIZE
    tokens = tl.arange(0, TOKENS)
    token_mask = tokens < token_count
    y = row_products(x_ptr, None, 0.0, weight_ptr, rows, row_mask, tokens, token_mask, COLUMNS, BLOCK, False, DEPENDENT)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, row_mask, 0.0).to(tl.float32)[None, :]
    place = tokens[:, None] * SIZE + rows[None, :]
    mask = token_mask[:, None] & row_mask[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + place, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask)


@kernel
def _norm_gate_up(
    x_ptr,
    norm_ptr,
    epsilon,
    weight_ptr,
    bias_ptr,
    out_ptr,
    token_count,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_next_kernel(DEPENDENT)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < SIZE
    tokens = tl.arange(0, TOKENS)
    token_mask = tokens < token_count
    gate, up = row_product_pairs(
        x_ptr,
        norm_ptr,
        epsilon,
        weight_ptr,
        rows,
        SIZE,
        row_mask,
        tokens,
        token_mask,
        COLUMNS,
        BLOCK,
        PLUS_ONE,
        DEPENDENT,
    )
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + rows, row_mask, 0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + SIZE + rows, row_mask, 0.0).to(tl.float32)[None, :]
    y = activate(gate, ACTIVATION) * up
    mask = token_mask[:, None] & row_mask[None, :]
    tl.store(out_ptr + tokens[:, None] * SIZE + rows[None, :], y.to(out_ptr.dtype.element_ty), mask)
