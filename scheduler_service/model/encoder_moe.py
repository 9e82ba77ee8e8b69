"""A mixture of experts in the place of an encoder's feed-forward block, as in nomic-embed-text-v2-moe."""

import torch

from quartet.kernels.reference import layers as plain_layers
from quartet.scheduler_service.model.encoder_spec import EncoderMoe, EncoderSpec
from quartet.scheduler_service.model.heads import ACTIVATIONS
from quartet.scheduler_service.model.layers import linear
from quartet.scheduler_service.weights.parameters import Layout, Weights


def add_experts(layout: Layout, spec: EncoderSpec, moe: EncoderMoe, place: int, prefix: str) -> None:
    """Places for the mixture in slab number `place`; names in the checkpoint begin with `prefix`, the layer's."""
    hidden, size = spec.hidden_size, spec.intermediate_size
    layout.add("router", (place,), [(f"{prefix}{moe.router}.weight", moe.experts)], hidden)
    layout.add("experts_bias", (place,), [(f"{prefix}{moe.bias}", hidden)], None)
    for expert in range(moe.experts):
        inside = f"{prefix}{moe.block}.{expert}."
        layout.add("expert_up", (place, expert), [(f"{inside}up_proj.weight", size)], hidden)
        layout.add("expert_down", (place, expert), [(f"{inside}down_proj.weight", hidden)], size)


class Experts:
    """Each token's best experts, weighted by their share among all of them, and one bias for their sum."""

    def __init__(self, spec: EncoderSpec, moe: EncoderMoe, weights: Weights, place: int) -> None:
        self.top_k = moe.top_k
        self.router = linear(weights, "router", place)
        self.up = [linear(weights, "expert_up", place, expert) for expert in range(moe.experts)]
        self.down = [linear(weights, "expert_down", place, expert) for expert in range(moe.experts)]
        self.bias = weights.slab("experts_bias", place)
        self.activation = ACTIVATIONS[spec.activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) of x (tokens, hidden)."""
        shares, ids = plain_layers.choose_experts(self.router(x), self.top_k, renormalize=False)
        return plain_layers.run_experts(x, shares, ids, self.up, self.down, self.activation) + self.bias
