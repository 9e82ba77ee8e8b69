"""Arithmetic whose bits for a token depend on that token's sequence alone, on the CPU.

What shares a step, where a prompt was cut, what the prefix cache held: none of it may show. Norms, rotation and
softmax keep to that by themselves. Products do where only certain numbers of rows are multiplied at once
(`Linear.keep_order`). sigmoid, silu and gelu of torch do not: the last elements of an array, which fill no vector
register, take another routine that rounds otherwise. exp, tanh and erf have one routine for all places, so the
activations are made of these.
"""

from collections.abc import Callable

import torch

from kernels.linear import Linear
from runtime.errors import StartupError
from scheduler_service.model.batch import ServedModel
from scheduler_service.model.decoder import Decoder
from scheduler_service.model.layers import Transform

NOT_OURS = "--enable-deterministic-inference needs a causal language model of a native family, and {} is none"
NOT_PACKED = "--enable-deterministic-inference needs products of packed weights, which this CPU does not have for {}"


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)), in float32."""
    return (-x.float()).exp_().add_(1.0).reciprocal_()


def silu(x: torch.Tensor) -> torch.Tensor:
    return x.float() * sigmoid(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return 0.5 * x * (1.0 + torch.erf(x * 0.7071067811865476))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


def gated(activation: Transform) -> Transform:
    """activation(first half) * second half of the last dimension."""

    def transform(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate).to(up.dtype) * up

    return transform


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": gated(silu),
    "gelu": gated(gelu),
    "gelu_new": gated(gelu_tanh),
    "gelu_pytorch_tanh": gated(gelu_tanh),
}


def make_deterministic(model: ServedModel) -> None:
    """Have a model compute in this way. Raises StartupError where it cannot."""
    if not isinstance(model, Decoder) or not model.spec.causal:
        raise StartupError(NOT_OURS.format(type(model).__name__))
    for linear, *_ in model.weights.followers:
        assert isinstance(linear, Linear)
        if linear.packed is None:
            raise StartupError(NOT_PACKED.format(model.dtype))
        linear.keep_order()
    activation = ACTIVATIONS[model.spec.activation]
    for layer in model.layers:
        if layer.moe is None:
            layer.mlp.activation = activation
            continue
        layer.moe.activation = activation
        layer.moe.sigmoid = sigmoid
        if layer.moe.shared is not None:
            layer.moe.shared.activation = activation
