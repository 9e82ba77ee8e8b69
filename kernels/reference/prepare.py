"""A decode step's first operation in plain torch, with the Triton kernel's signature."""

import torch
import torch.nn.functional as F


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
    held = slots.long().clamp(min=0)
    runs = (slots >= 0) & (finished[held] == 0)
    input_ids.copy_(torch.where(runs, last_tokens[held], 0))
    positions.copy_(torch.where(runs, next_positions[held], 0))
    pages = torch.where(runs, page_table[held, positions.long() // page_size].long(), 0)
    kv_slots.copy_(pages * page_size + positions % page_size)
    lengths.copy_(torch.where(runs, positions + 1, 0))
    x.copy_(F.embedding(input_ids.long(), embedding).float() * scale)
    cos.copy_(rotary[positions.long(), :1])
    sin.copy_(rotary[positions.long(), 1:])
    next_positions[held[runs]] += 1
