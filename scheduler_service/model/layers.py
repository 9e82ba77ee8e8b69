"""The blocks of a decoder layer besides attention: norms and the feed-forward block."""

from collections.abc import Callable

import torch

from kernels import reference
from kernels.linear import Linear
from scheduler_service.model.spec import DecoderSpec
from scheduler_service.model.weights import Weights

Transform = Callable[[torch.Tensor], torch.Tensor]

NORMS = {"rms": reference.rms_norm, "rms_plus_one": reference.rms_norm_plus_one}
ACTIVATIONS = {
    "silu": reference.silu_and_mul,
    "gelu": reference.gelu_and_mul,
    "gelu_new": reference.gelu_tanh_and_mul,
    "gelu_pytorch_tanh": reference.gelu_tanh_and_mul,
}


class Norm:
    """A norm over the last dimension."""

    def __init__(self, spec: DecoderSpec, weight: torch.Tensor) -> None:
        self.function = NORMS[spec.norm]
        self.weight = weight
        self.epsilon = spec.norm_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight, self.epsilon)


def optional_norm(spec: DecoderSpec, weights: Weights, place: str, layer: int) -> Norm | None:
    """The norm of a place in the layer, if the family has one there."""
    return Norm(spec, weights.slab(place, layer)) if getattr(spec.names, place) else None


def linear(weights: Weights, buffer: str, *index: int, bias: bool = False) -> Linear:
    """The linear layer of a slab, kept in step with later updates of the weights."""
    layer = Linear(weights.slab(buffer, *index), weights.slab(f"{buffer}_bias", *index) if bias else None)
    weights.follow(layer, buffer, index)
    return layer


class Mlp:
    """down(activation(gate(x)) * up(x)), with gate and up in one matrix."""

    def __init__(self, gate_up: Linear, down: Linear, activation: str) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activation = ACTIVATIONS[activation]

    @classmethod
    def dense(cls, spec: DecoderSpec, weights: Weights, slab: int) -> "Mlp":
        gate_up = linear(weights, "gate_up", slab, bias=spec.mlp_bias)
        return cls(gate_up, linear(weights, "down", slab, bias=spec.mlp_bias), spec.activation)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate_up(x)))
