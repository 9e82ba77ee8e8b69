"""Leaves of each row of a matrix what a bit mask allows."""

import ctypes

import torch

from quartet.kernels.cpu.native import library as native


def mask_rows(x: torch.Tensor, allowed: torch.Tensor) -> bool:
    """What is not allowed becomes -inf, in place. False, and nothing is done, where there is no kernel for it.

    x (rows, n); allowed (rows, ceil(n / 32)) int32: bit i % 32 of word i // 32 is for column i. torch takes ten times
    as long on a CPU: it branches for each number.
    """
    kernels = native.at_hand()
    on_cpu = x.device.type == allowed.device.type == "cpu"
    if kernels is None or not on_cpu or x.dtype is not torch.float32 or x.stride(1) != 1 or not allowed.is_contiguous():
        return False
    rows, n = x.shape
    assert allowed.dtype is torch.int32 and allowed.shape == (rows, -(-n // 32)), (x.shape, allowed.shape)
    mask = kernels.functions.quartet_mask
    if mask.argtypes is None:
        mask.argtypes = (ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
        mask.restype = None
    mask(x.data_ptr(), rows, n, x.stride(0), allowed.data_ptr(), allowed.shape[1], torch.get_num_threads())
    return True
