"""The activations of feed-forward blocks, by their names in config.json; gates and what they scale are halves."""

from collections.abc import Callable

import torch

from quartet.kernels.reference import layers as plain
from quartet.scheduler_service.model import deterministic as steady

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": plain.silu_and_mul,
    "gelu": plain.gelu_and_mul,
    "gelu_new": plain.gelu_tanh_and_mul,
    "gelu_pytorch_tanh": plain.gelu_tanh_and_mul,
    "clamped_swiglu": plain.clamped_swiglu,
    "relu2": plain.squared_relu,
}


def activations(deterministic: bool) -> dict[str, Activation]:
    """All of them; `deterministic`: an element's bits do not depend on its place."""
    return steady.ACTIVATIONS if deterministic else ACTIVATIONS
