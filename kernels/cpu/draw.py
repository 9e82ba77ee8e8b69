"""Draws tokens from rows of logits on a CPU, and normalizes them: see native/draw.h."""

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from quartet.kernels.cpu.largest import largest_of_rows
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.structures import Drawing, Summing

SMALL = 1 << 17  # numbers that one thread is done with before another one is awake


class RowsToDraw(NamedTuple):
    """Of the rows that are drawn from, one item each: their places among the logits, and how they are drawn."""

    rows: Sequence[int]
    temperatures: Sequence[float]  # which the logits are to be divided by
    top_ks: Sequence[int]  # 0: all tokens
    top_ps: Sequence[float]  # 1: all
    min_ps: Sequence[float]  # 0: all
    seeds: Sequence[int]  # int64
    positions: Sequence[int]


def can_draw(logits: torch.Tensor) -> bool:
    """Whether there is a kernel for these logits."""
    usable = logits.device.type == "cpu" and logits.dtype is torch.float32 and logits.dim() == 2
    return usable and logits.stride(1) == 1 and native.at_hand() is not None


def draw_rows(
    logits: torch.Tensor, best: torch.Tensor, given: RowsToDraw, tokens: torch.Tensor, valid: torch.Tensor
) -> None:
    """Write the token of each row to be drawn from, and whether its largest logit is finite; if not, the token is 0.

    logits (rows, vocab), best (rows,): their largest; tokens (rows,) int64 and valid (rows,) bool, written in place.
    Only where `can_draw` says yes. A row's token depends on that row alone, and is the same on all machines.
    """
    kernels = native.library()
    assert kernels is not None and best.dtype is torch.float32 and tokens.dtype is torch.int64
    assert valid.dtype is torch.bool and best.shape == tokens.shape == valid.shape == logits.shape[:1], logits.shape
    columns = [array(code, values) for code, values in zip("qfqdfqq", given, strict=True)]
    pointers = [column.buffer_info()[0] for column in columns]
    outputs = (best.data_ptr(), tokens.data_ptr(), valid.data_ptr())
    shape = (logits.shape[1], logits.stride(0), len(given.rows))
    wanted = Drawing(logits.data_ptr(), *shape, *pointers, *outputs, threads_for(len(given.rows) * logits.shape[1]))
    draw = kernels.functions.quartet_draw
    if draw.argtypes is None:
        draw.argtypes = (ctypes.c_void_p, ctypes.POINTER(Drawing))
    if draw(kernels.kernels, wanted):
        raise MemoryError(f"no memory for a draw from {logits.shape[1]} tokens")


def log_of_sums(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(row))) of logits (rows, vocab): (rows, 1) float32; NaN for a row whose largest is not finite.

    Only where `can_draw` says yes.
    """
    kernels = native.library()
    assert kernels is not None
    best, _ = largest_of_rows(logits)
    out = torch.empty_like(best)
    find = kernels.functions.quartet_log_of_sums
    if find.argtypes is None:
        find.argtypes, find.restype = (ctypes.c_void_p, ctypes.POINTER(Summing)), None
    shape = (*logits.shape, logits.stride(0))
    pointers = (best.data_ptr(), out.data_ptr())
    find(kernels.kernels, Summing(logits.data_ptr(), *shape, *pointers, threads_for(logits.numel())))
    return out.unsqueeze(1)


def threads_for(numbers: int) -> int:
    return 1 if numbers <= SMALL else torch.get_num_threads()
