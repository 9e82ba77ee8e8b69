"""Linear attention by the gated delta rule: spec, weights, and how torch computes it (Qwen3-Next, Qwen3.5)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.reference.layers import rms_norm
from quartet.kernels.reference.recurrent import causal_convolution, gated_delta_rule, gated_delta_rule_by_chunks
from quartet.scheduler_service.model.deterministic import sigmoid, silu, softplus
from quartet.scheduler_service.model.state_access import StateAccess, StateSpec
from quartet.scheduler_service.weights.parameters import Layout, Weights

FEW_TOKENS = 8  # up to so many the rule is followed token by token


@dataclass(frozen=True, slots=True)
class GatedDeltaSpec:
    """Values and keys go through a short convolution, then through the rule; the result is normed and gated."""

    taps: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    by_key_head: bool  # the checkpoint has one product, by key heads: query, key, values, gates; else one of each kind
    epsilon: float
    block: str = "linear_attn"

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """The rows of `inner` are queries, keys, values and gates, those of `rates` beta and the decay's input."""

    shape: GatedDeltaSpec
    spec: StateSpec
    inner: Linear
    rates: Linear
    output: Linear
    weight: torch.Tensor  # (channels, 1, taps)
    decay_bias: torch.Tensor  # (value heads,)
    decay_log: torch.Tensor  # (value heads,) float32
    norm: torch.Tensor  # (value dim,)

    def mix(self, x: torch.Tensor, states: StateAccess, deterministic: bool) -> torch.Tensor:
        """x (tokens, hidden), normed, → (tokens, value heads * value dim), in front of the output product."""
        shape, tokens = self.shape, len(x)
        mixed, gate, beta, decay = self.projected(x)
        beta = sigmoid(beta)
        decay = -self.decay_log.float().exp() * softplus(decay.float() + self.decay_bias.float())
        weight = self.weight.squeeze(1)

        def compute(inputs: torch.Tensor, window: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rates = inputs[..., shape.channels :].float()
            values = inputs[..., : shape.channels].to(x.dtype)
            values, window = causal_convolution(values, window, weight, None)
            query, key, value = (
                silu(values.to(x.dtype)).to(x.dtype).float().split((shape.keys, shape.keys, shape.values), dim=-1)
            )
            group = shape.value_heads // shape.key_heads
            heads = [part.unflatten(-1, (shape.key_heads, -1)).repeat_interleave(group, dim=2) for part in (query, key)]
            value = value.unflatten(-1, (shape.value_heads, -1))
            by_token = deterministic or value.shape[1] <= FEW_TOKENS
            rule = gated_delta_rule if by_token else gated_delta_rule_by_chunks
            decays, betas = rates.chunk(2, dim=-1)
            y, state = rule(heads[0], heads[1], value, decays, betas, state)
            return y.flatten(2).to(x.dtype), window, state

        inputs = torch.cat((mixed.float(), decay, beta), dim=-1)
        y = states.scan(self.spec.layer, compute, inputs).view(tokens, -1, shape.value_dim)
        normed = rms_norm(y, self.norm, shape.epsilon).float() * silu(gate.reshape(y.shape))
        return normed.to(x.dtype).flatten(1)

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(queries, keys and values side by side; gates; beta and decay before their functions), by head."""
        shape = self.shape
        inner, rates = self.inner(x), self.rates(x)
        if not shape.by_key_head:
            beta, decay = rates.chunk(2, dim=-1)
            mixed, gate = inner.split((shape.channels, shape.values), dim=-1)
            return mixed, gate, beta, decay
        group = shape.value_heads // shape.key_heads * shape.value_dim
        by_head = inner.unflatten(-1, (shape.key_heads, -1)).split((shape.key_dim, shape.key_dim, group, group), dim=-1)
        query, key, value, gate = (part.flatten(1) for part in by_head)
        beta, decay = (part.flatten(1) for part in rates.unflatten(-1, (shape.key_heads, -1)).chunk(2, dim=-1))
        return torch.cat((query, key, value), dim=-1), gate, beta, decay


def add_gated_delta(layout: Layout, spec: GatedDeltaSpec, hidden: int, slab: int, prefix: str) -> None:
    """Places for one layer's weights; `slab`: its number among recurrent layers."""
    inside = f"{prefix}{spec.block}."
    inner, rates = spec.channels + spec.values, 2 * spec.value_heads
    products = [("in_proj_qkvz", inner)], [("in_proj_ba", rates)]
    if not spec.by_key_head:
        products = (
            [("in_proj_qkv", spec.channels), ("in_proj_z", spec.values)],
            [("in_proj_b", spec.value_heads), ("in_proj_a", spec.value_heads)],
        )
    for buffer, names in zip(("delta_in", "delta_rates"), products, strict=True):
        layout.add(buffer, (slab,), [(f"{inside}{name}.weight", rows) for name, rows in names], hidden)
    layout.add("delta_conv", (slab,), [(f"{inside}conv1d.weight", spec.channels)], (1, spec.taps))
    layout.add("delta_bias", (slab,), [(f"{inside}dt_bias", spec.value_heads)], None)
    layout.add("delta_log", (slab,), [(f"{inside}A_log", spec.value_heads)], None)
    layout.dtypes["delta_log"] = torch.float32
    layout.add("delta_norm", (slab,), [(f"{inside}norm.weight", spec.value_dim)], None)
    layout.add("delta_out", (slab,), [(f"{inside}out_proj.weight", hidden)], spec.values)


def gated_delta(
    spec: GatedDeltaSpec, weights: Weights, layer: int, slab: int, linear: Callable[..., Linear]
) -> GatedDelta:
    """The mixer of a layer; `linear` makes a product of a slab that follows updates of the weights."""
    shapes = (spec.taps - 1, spec.channels), (spec.value_heads, spec.key_dim, spec.value_dim)
    return GatedDelta(
        shape=spec,
        spec=StateSpec(layer, shapes, (weights.dtype, torch.float32)),
        inner=linear(weights, "delta_in", slab),
        rates=linear(weights, "delta_rates", slab),
        output=linear(weights, "delta_out", slab),
        weight=weights.slab("delta_conv", slab),
        decay_bias=weights.slab("delta_bias", slab),
        decay_log=weights.slab("delta_log", slab),
        norm=weights.slab("delta_norm", slab),
    )
