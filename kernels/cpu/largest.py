"""The largest number of each row of a matrix and its place."""

import ctypes

import torch

from quartet.kernels.cpu.native import library as native


def largest_of_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As x.max(1): x (rows, n) → values and the first places (rows,) int64; a NaN counts as the largest.

    torch takes four times as long on a CPU, where each number is compared with its place at hand.
    """
    kernels = native.at_hand()
    usable = x.device.type == "cpu" and x.dtype is torch.float32 and x.dim() == 2 and x.stride(1) == 1
    if kernels is None or not usable or not x.shape[1]:
        values, places = x.max(1)
        return values, places
    values, places = x.new_empty(len(x)), x.new_empty(len(x), dtype=torch.int64)
    find = kernels.functions.quartet_largest
    if find.argtypes is None:
        find.argtypes = (ctypes.c_void_p, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2, ctypes.c_int32)
        find.restype = None
    find(x.data_ptr(), *x.shape, x.stride(0), values.data_ptr(), places.data_ptr(), torch.get_num_threads())
    return values, places
