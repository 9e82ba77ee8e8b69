"""Norms and gated activations, for batches that cuBLAS multiplies."""

import torch
import triton.language as tl

from quartet.kernels.triton.common import activate, blocks, options, power_of_two, scale_of_norm
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import tile


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, plus_one: bool, out: torch.Tensor) -> None:
    """See kernels.operations.Ops.rms_norm."""
    chosen = tile("rms_norm")
    rows, columns = x.shape
    _rms_norm[(rows,)](x, weight, out, epsilon, columns, power_of_two(columns), plus_one, **options(chosen))


def gated_activation(gate_up: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """See kernels.operations.Ops.gated_activation."""
    chosen = tile("gated_activation")
    rows, size = out.shape
    grid = (rows, blocks(size, chosen.columns))
    _gated_activation[grid](gate_up, out, size, chosen.columns, activation, **options(chosen))


@kernel
def _rms_norm(
    x_ptr,
    weight_ptr,
    out_ptr,
    epsilon,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    mask = columns < COLUMNS
    place = tl.program_id(0).to(tl.int64) * COLUMNS + columns
    x = tl.load(x_ptr + place, mask, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / COLUMNS + epsilon)
    normed = x * inverse * scale_of_norm(weight_ptr, columns, mask, PLUS_ONE)
    tl.store(out_ptr + place, normed.to(out_ptr.dtype.element_ty), mask)


@kernel
def _gated_activation(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + columns, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + columns, mask, 0.0).to(tl.float32)
    gated = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + row * SIZE + columns, gated.to(out_ptr.dtype.element_ty), mask)
