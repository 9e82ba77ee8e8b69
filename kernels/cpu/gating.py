"""activation(gate) * factor of bfloat16 rows by the compiled kernels."""

import ctypes

import torch

from quartet.kernels.cpu.native.library import ACTIVATIONS, Library
from quartet.kernels.cpu.native.structures import Gating


def gated(kernels: Library, gate: torch.Tensor, factor: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate), rounded, times factor: all (rows, width); `activation` is one of native.ACTIVATIONS."""
    for tensor in (gate, factor):
        assert tensor.dtype is torch.bfloat16 and tensor.is_contiguous(), (tensor.dtype, tensor.stride())
    assert gate.dim() == 2 and gate.shape == factor.shape, (gate.shape, factor.shape)
    out, run = torch.empty_like(gate), kernels.functions.quartet_gate_rows
    run.argtypes, run.restype = (ctypes.c_void_p, ctypes.POINTER(Gating)), None
    memory = gate.data_ptr(), factor.data_ptr(), out.data_ptr()
    run(kernels.kernels, Gating(*memory, *gate.shape, 0.0, ACTIVATIONS[activation], torch.get_num_threads()))
    return out
