"""Arithmetic whose bits for a token depend only on that token's sequence, on the CPU.

The other requests of a step, the chunks of a prompt and the prefix cache must not change them. Norms, rotation and
softmax keep to that by themselves. Products do where only certain numbers of rows are multiplied at once
(`Linear.keep_order`). sigmoid, silu and gelu of torch do not: the last elements of an array, which fill no vector
register, take another routine that rounds otherwise. exp, tanh and erf have one routine for all places, so the
activations are made of these.
"""

import logging
from collections.abc import Callable

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.reference.layers import squared_relu
from quartet.runtime.config import ServerConfig
from quartet.scheduler_service.weights.parameters import Weights

log = logging.getLogger(__name__)

NOT_NATIVE = "--enable-deterministic-inference needs a causal language model of a native family, and {} is none"

Transform = Callable[[torch.Tensor], torch.Tensor]


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)), in float32."""
    return (-x.float()).exp_().add_(1.0).reciprocal_()


def silu(x: torch.Tensor) -> torch.Tensor:
    return x.float() * sigmoid(x)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), in float32."""
    x = x.float()
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x)))


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


def clamped_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See kernels.reference.layers.clamped_swiglu."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * sigmoid(gate * 1.702).to(gate.dtype) * (up + 1)


ACTIVATIONS: dict[str, Transform] = {
    "silu": gated(silu),
    "gelu": gated(gelu),
    "gelu_new": gated(gelu_tanh),
    "gelu_pytorch_tanh": gated(gelu_tanh),
    "clamped_swiglu": clamped_swiglu,
    "relu2": squared_relu,
}


def is_asked_for(config: ServerConfig, device: torch.device) -> bool:
    """Whether models on this device have to compute in this way; on a GPU the fused operations see to it."""
    return config.enable_deterministic_inference and device.type == "cpu"


def keep_order(weights: Weights) -> None:
    """Have all products of loaded weights keep the order of their sums."""
    most_rows: list[int] = []
    for linear, *_ in weights.followers:
        assert isinstance(linear, Linear)
        linear.keep_order()
        most_rows += linear.row_counts[-1:]
    if most_rows:
        log.info("deterministic inference: products of at most %d rows at once", min(most_rows))
