"""Heads: what classifiers, reward models and language models put on top of hidden states."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from quartet.kernels.cpu.linear import Linear
from quartet.scheduler_service.model.layers import linear
from quartet.scheduler_service.model.spec import HeadLayer
from quartet.scheduler_service.weights.parameters import Layout, Weights

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def add_head(layout: Layout, layers: tuple[HeadLayer, ...], buffer: str = "head") -> None:
    """Give each layer of a head its buffers."""
    for place, layer in enumerate(layers):
        layout.add(f"{buffer}_{place}", (), [(f"{layer.name}.weight", layer.outputs)], layer.inputs)
        if layer.bias:
            layout.add(f"{buffer}_{place}_bias", (), [(f"{layer.name}.bias", layer.outputs)], None)
        if layer.norm:
            layout.add(f"{buffer}_{place}_norm", (), [(f"{layer.norm}.{layer.norm_names[0]}", layer.outputs)], None)
        if layer.norm_bias:
            layout.add(
                f"{buffer}_{place}_norm_bias", (), [(f"{layer.norm}.{layer.norm_names[1]}", layer.outputs)], None
            )


class Head:
    """Pooled states (rows, hidden) → scores (rows, labels)."""

    def __init__(self, layers: tuple[HeadLayer, ...], weights: Weights, buffer: str = "head") -> None:
        self.layers = layers
        self.buffer = buffer
        self.weights = weights
        self.linears: list[Linear] = [
            linear(weights, f"{buffer}_{place}", bias=layer.bias) for place, layer in enumerate(layers)
        ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for place, (layer, project) in enumerate(zip(self.layers, self.linears, strict=True)):
            x = project(x)
            if layer.activation:
                x = ACTIVATIONS[layer.activation](x)
            if layer.norm:
                bias = self.weights.slab(f"{self.buffer}_{place}_norm_bias") if layer.norm_bias else None
                weight = self.weights.slab(f"{self.buffer}_{place}_norm")
                x = F.layer_norm(x, (layer.outputs,), weight, bias, layer.norm_epsilon)
        return x
