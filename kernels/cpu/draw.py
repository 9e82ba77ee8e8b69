"""Chooses a token from each row of logits on a CPU, and normalizes rows: see native/draw.h."""

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
    """How a token is chosen from each row of logits."""

    temperatures: Sequence[float]  # which the logits are to be divided by; 0: the first largest logit is taken
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
    logits: torch.Tensor, given: RowsToDraw, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row (rows,) int64, and whether its largest logit is finite (rows,) bool; else its token is 0.

    logits (rows, vocab) stay as they are. allowed (rows, ceil(vocab / 32)) int32: bit i % 32 of word i // 32 allows
    token i; by default all are. Only where `can_draw` says yes. A row's token depends on that row alone, and is the
    same on all machines.
    """
    kernels, (rows, vocab) = native.library(), logits.shape
    assert kernels is not None and all(len(values) == rows for values in given), (logits.shape, given)
    words = 0 if allowed is None else allowed.shape[1]
    if allowed is not None:
        assert allowed.shape == (rows, -(-vocab // 32)) and allowed.is_contiguous(), (logits.shape, allowed.shape)
        assert allowed.dtype is torch.int32 and allowed.device.type == "cpu", (allowed.dtype, allowed.device)
    columns = [array(code, values) for code, values in zip("fqdfqq", given, strict=True)]
    tokens, valid = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.bool)
    wanted = Drawing(
        logits.data_ptr(),
        rows,
        vocab,
        logits.stride(0),
        None if allowed is None else allowed.data_ptr(),
        words,
        *[column.buffer_info()[0] for column in columns],
        tokens.data_ptr(),
        valid.data_ptr(),
        threads_for(logits.numel()),
    )
    draw = kernels.functions.quartet_draw
    if draw.argtypes is None:
        draw.argtypes = (ctypes.c_void_p, ctypes.POINTER(Drawing))
    if draw(kernels.kernels, wanted):
        raise MemoryError(f"no memory for a draw from {vocab} tokens")
    return tokens, valid


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
