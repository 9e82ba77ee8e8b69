"""A layer's mixture of experts: route each token to a few experts and sum what they say."""

from collections.abc import Callable

import torch

from kernels import reference
from scheduler_service.model.layers import ACTIVATIONS, Mlp, Transform, linear
from scheduler_service.model.spec import DecoderSpec, MoeSpec
from scheduler_service.model.weights import Weights


class Moe:
    """Router, experts and, where the family has one, the expert that every token passes."""

    def __init__(self, spec: DecoderSpec, moe: MoeSpec, weights: Weights, slab: int) -> None:
        self.moe = moe
        self.activation = ACTIVATIONS[spec.activation]
        self.sigmoid: Transform = torch.sigmoid
        self.router = linear(weights, "router", slab)
        self.gate_up = [linear(weights, "expert_gate_up", slab, expert) for expert in range(moe.experts)]
        self.down = [linear(weights, "expert_down", slab, expert) for expert in range(moe.experts)]
        self.shared: Mlp | None = None
        if moe.shared_intermediate_size:
            shared = linear(weights, "shared_gate_up", slab), linear(weights, "shared_down", slab)
            self.shared = Mlp(*shared, spec.activation)
            self.shared_gate = linear(weights, "shared_gate", slab)

    def __call__(self, x: torch.Tensor, record: Callable[[torch.Tensor], None] | None) -> torch.Tensor:
        """x (tokens, hidden) → (tokens, hidden); `record` is told the chosen experts (tokens, top_k)."""
        weights, ids = reference.choose_experts(self.router(x), self.moe.top_k, self.moe.renormalize)
        if record:
            record(ids)
        y = reference.run_experts(x, weights, ids, self.gate_up, self.down, self.activation)
        if self.shared is not None:
            y = torch.addcmul(y, self.sigmoid(self.shared_gate(x)).to(x.dtype), self.shared(x))
        return y
