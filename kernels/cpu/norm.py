"""Root-mean-square norms of whole rows by the compiled kernels."""

import ctypes

import torch

from quartet.kernels.cpu.native.library import Library, NormWeight
from quartet.kernels.cpu.native.structures import Norm, Rows


def can_norm(x: torch.Tensor) -> bool:
    """Whether `normed` takes x."""
    return x.dim() == 2 and x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.is_contiguous()


def normed(kernels: Library, x: torch.Tensor, norm: NormWeight) -> torch.Tensor:
    """x / rms(x) * (weight + what is added to it), rows of (rows, width), rounded to bfloat16 once."""
    weight, epsilon, offset = norm
    rows, width = x.shape
    assert can_norm(x) and weight.shape == (width,), (x.shape, x.dtype, x.stride(), weight.shape)
    assert weight.dtype is torch.bfloat16 and weight.is_contiguous(), (weight.dtype, weight.stride())
    out = torch.empty_like(x)
    function = kernels.functions.quartet_norm
    if function.argtypes is None:
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.POINTER(Rows)), None
    own = Norm(weight.data_ptr(), epsilon, offset)
    function(kernels.kernels, Rows(x.data_ptr(), None, out.data_ptr(), rows, width, own, 0.0, torch.get_num_threads()))
    return out
