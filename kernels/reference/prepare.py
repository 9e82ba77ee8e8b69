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
    """Row i gets what slots[i] (rows,) holds: its last token and that one's position, which moves on by one.

    Out: input_ids, positions, kv_slots (rows,) int64, lengths (rows,) int32 with the new key counted, x (rows, hidden)
    = embedding * scale, cos and sin (rows, 1, rotary_dim) from rotary (positions, 2, rotary_dim). A row whose slot is
    below 0 or finished gets token 0 at position 0, writes to the null page and has length 0.
    """
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
