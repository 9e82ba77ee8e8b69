"""Products and norms as the compiled kernels take them, without what a step decides: rows, threads, memory."""

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native import structures
from quartet.kernels.cpu.native.library import ACTIVATIONS, NOT_QUANTIZED, OUTPUTS, NormWeight
from quartet.kernels.cpu.native.structures import Product


def product(linear: Linear, output: str, norm: NormWeight | None = None, activation: str = "silu") -> Product:
    """A product by a layer's weight."""
    n, k = linear.weight.shape
    _, epsilon, offset = norm or (None, 0.0, 0.0)
    weight = linear.native_weight()
    is_packed = not isinstance(weight, structures.Quantized)
    return Product(
        x_stride=k,
        norm=pointer(norm),
        epsilon=epsilon,
        norm_offset=offset,
        packed=weight.data_ptr() if is_packed else None,
        quantized=NOT_QUANTIZED if is_packed else weight,
        n=n,
        k=k,
        bias=None if linear.bias is None else linear.bias.data_ptr(),
        output=OUTPUTS[output],
        activation=ACTIVATIONS[activation],
        out_stride=n // 2 if output == "gated" else n,
        number=linear.number,
    )


def norm_argument(norm: NormWeight | None) -> structures.Norm:
    """A norm, or none."""
    return structures.Norm() if norm is None else structures.Norm(pointer(norm), norm[1], norm[2])


def pointer(norm: NormWeight | None) -> int | None:
    return None if norm is None else norm[0].data_ptr()


def check_norm(norm: NormWeight | None, width: int) -> None:
    """Raise AssertionError unless a norm fits rows of so many numbers. C code trusts it."""
    weight = None if norm is None else norm[0]
    assert weight is None or (weight.shape == (width,) and weight.dtype is torch.bfloat16), weight


def check_linear(linear: Linear, n: int, k: int) -> None:
    """Raise AssertionError unless a layer has a weight (n, k) and, if any, a bias that fits."""
    bias = linear.bias
    assert linear.weight.shape == (n, k), (linear.weight.shape, n, k)
    assert bias is None or (bias.shape == (n,) and bias.dtype is torch.bfloat16), bias
