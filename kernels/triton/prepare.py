"""The first node of a decode step, and the rare moves of whole pages.

`prepare` reads what the slots of the running requests hold and lays it out by row, so that a step in steady state
needs nothing from the host: the last step's tokens and the positions are on the device already.
"""

import torch
import triton.language as tl

from quartet.kernels.triton.common import blocks, options, power_of_two
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import tile


def prepare(
    slots: torch.Tensor,
    last_tokens: torch.Tensor,
    next_positions: torch.Tensor,
    finished: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    embedding: torch.Tensor,
    scale: float,
    rotary: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    lengths: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.prepare."""
    chosen = tile("prepare")
    rows, hidden = x.shape
    rotary_dim = cos.shape[2]
    _prepare[(rows, blocks(hidden, chosen.columns))](
        slots,
        last_tokens,
        next_positions,
        finished,
        page_table,
        embedding,
        rotary,
        input_ids,
        positions,
        kv_slots,
        lengths,
        x,
        cos,
        sin,
        page_table.stride(0),
        scale,
        page_size,
        hidden,
        rotary_dim,
        power_of_two(rotary_dim),
        chosen.columns,
        **options(chosen),
    )


@kernel
def _prepare(
    slots_ptr,
    last_tokens_ptr,
    next_positions_ptr,
    finished_ptr,
    table_ptr,
    embedding_ptr,
    rotary_ptr,
    input_ids_ptr,
    positions_ptr,
    kv_slots_ptr,
    lengths_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    table_stride,
    scale,
    PAGE: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    runs = slot >= 0
    if runs:
        runs = tl.load(finished_ptr + slot) == 0
    token = tl.load(last_tokens_ptr + slot, runs, 0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    x = tl.load(embedding_ptr + token * HIDDEN + columns, mask, 0.0).to(tl.float32) * scale
    tl.store(x_ptr + row.to(tl.int64) * HIDDEN + columns, x.to(x_ptr.dtype.element_ty), mask)
    if tl.program_id(1) > 0:  # one program alone reads the position and moves it
        return
    position = tl.load(next_positions_ptr + slot, runs, 0).to(tl.int64)
    tl.store(next_positions_ptr + slot, position + 1, runs)
    page = tl.load(table_ptr + slot * table_stride + position // PAGE, runs, 0).to(tl.int64)
    tl.store(input_ids_ptr + row, token)
    tl.store(positions_ptr + row, position)
    tl.store(kv_slots_ptr + row, page * PAGE + position % PAGE)
    tl.store(lengths_ptr + row, tl.where(runs, position + 1, 0).to(tl.int32))
    dims = tl.arange(0, BLOCK_ROTARY)
    own_rotary_ptr = rotary_ptr + position * 2 * ROTARY
    tl.store(cos_ptr + row * ROTARY + dims, tl.load(own_rotary_ptr + dims, dims < ROTARY), dims < ROTARY)
    tl.store(sin_ptr + row * ROTARY + dims, tl.load(own_rotary_ptr + ROTARY + dims, dims < ROTARY), dims < ROTARY)
