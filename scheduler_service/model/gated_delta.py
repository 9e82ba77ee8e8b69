"""Linear attention by the gated delta rule: spec, weights, and how torch computes it.

Qwen3-Next, Qwen3.5 and OLMo Hybrid forget by head, Kimi-Linear by channel.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from quartet.kernels.cpu import recurrent as native
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native.library import Library
from quartet.kernels.operations import Ops
from quartet.kernels.reference.layers import rms_norm
from quartet.kernels.reference.recurrent import causal_convolution, gated_delta_rule, gated_delta_rule_by_chunks
from quartet.scheduler_service.model.deterministic import sigmoid, silu, softplus
from quartet.scheduler_service.model.state_access import StateAccess, StateSpec
from quartet.scheduler_service.weights.parameters import Layout, Rows, Weights

FEW_TOKENS = 8  # up to so many the rule is followed token by token


@dataclass(frozen=True, slots=True)
class DeltaNames:
    """Checkpoint names below the block: one for each part, or fewer for parts that are stored as one."""

    inner: tuple[str, ...] = ("in_proj_qkv", "in_proj_z")  # queries, keys, values, gates
    rates: tuple[str, ...] = ("in_proj_b", "in_proj_a")  # beta and the decay's input; with `narrow` the gates' behind
    narrow: tuple[str, str] | None = None  # the second products of decay and gates, where they are made in two
    convolution: tuple[str, ...] = ("conv1d",)
    norm: str = "norm"
    output: str = "out_proj"


@dataclass(frozen=True, slots=True)
class GatedDeltaSpec:
    """Values and keys go through a short convolution, then through the rule; the result is normed and gated."""

    taps: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    epsilon: float
    by_key_head: bool = False  # the rows of a product are ordered by key heads: query, key, values, gates; else by kind
    beta_factor: float = 1.0
    gate: Literal["silu", "sigmoid"] = "silu"
    block: str = "linear_attn"
    names: DeltaNames = field(default_factory=DeltaNames)

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

    @property
    def inner_rows(self) -> tuple[int, ...]:
        """Of the first product, by kind; with narrow products for the gates, without these."""
        parts = self.keys, self.keys, self.values, self.values
        return parts[:3] if self.names.narrow else parts

    @property
    def rate_rows(self) -> tuple[int, ...]:
        """Of the second."""
        heads = self.value_heads
        return (heads, self.key_dim, self.value_dim) if self.names.narrow else (heads, heads)


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """The rows of `inner` are queries, keys, values and gates, those of `rates` beta and the decay's input.

    Where decay and gates are made in two products, the first ones are in `rates`, behind beta.
    """

    shape: GatedDeltaSpec
    spec: StateSpec
    inner: Linear
    rates: Linear
    forget: Linear | None
    gate: Linear | None
    output: Linear
    weight: torch.Tensor  # (channels, 1, taps)
    decay_bias: torch.Tensor  # (value heads,), or as many for each as keys have channels
    decay_log: torch.Tensor  # (value heads,) float32; Kimi-Linear's has dimensions of size one around it
    norm: torch.Tensor  # (value dim,)

    def mix(self, x: torch.Tensor, states: StateAccess, deterministic: bool) -> torch.Tensor:
        """x (tokens, hidden), normed, → (tokens, value heads * value dim), in front of the output product."""
        shape, tokens = self.shape, len(x)
        mixed, gate, beta, decay = self.projected(x)
        if states.kernels is not None and native.can_run(x.dtype, shape.taps, shape.key_dim):
            return self.mix_native(states.kernels, states, mixed, gate, beta, decay)
        beta = sigmoid(beta) * shape.beta_factor
        rate = self.decay_log.float().exp().flatten().repeat_interleave(decay.shape[-1] // shape.value_heads)
        decay = -rate * softplus(decay.float() + self.decay_bias.float())
        decays = decay.shape[-1]
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
            forgets, betas = rates.split((decays, shape.value_heads), dim=-1)
            y, state = rule(heads[0], heads[1], value, forgets.unflatten(-1, (shape.value_heads, -1)), betas, state)
            return y.flatten(2).to(x.dtype), window, state

        def update(
            ops: Ops, rows: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor, *pools: torch.Tensor
        ) -> torch.Tensor:
            values, forgets, betas = rows.split((shape.channels, decays, shape.value_heads), dim=-1)
            convolved, out = x.new_empty(values.shape), x.new_empty(len(rows), shape.values)
            ops.convolve_row(values.to(x.dtype), weight, None, True, reads, writes, pools[0], convolved)
            ops.delta_update(convolved, forgets.contiguous(), betas.contiguous(), reads, writes, pools[1], out)
            return out

        inputs = torch.cat((mixed.float(), decay, beta), dim=-1)
        y = states.scan(self.spec.layer, compute, inputs, update).view(tokens, -1, shape.value_dim)
        gating = silu if shape.gate == "silu" else sigmoid
        normed = rms_norm(y, self.norm, shape.epsilon).float() * gating(gate.reshape(y.shape))
        return normed.to(x.dtype).flatten(1)

    def mix_native(
        self,
        kernels: Library,
        states: StateAccess,
        mixed: torch.Tensor,
        gate: torch.Tensor,
        beta: torch.Tensor,
        decay: torch.Tensor,
    ) -> torch.Tensor:
        """The same by the kernels of the CPU, from what `projected` gives."""
        shape = self.shape
        window, state = states.pools[self.spec.layer]
        return native.gated_delta(
            kernels,
            states.table,
            mixed,
            native.Convolution(self.weight, None, window),
            native.Decay(decay, self.decay_bias, self.decay_log),
            native.Beta(beta, shape.beta_factor),
            state,
            native.Gates(gate, self.norm, "by head", shape.value_heads, shape.epsilon, shape.gate == "sigmoid"),
        )

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(queries, keys and values side by side; gates; beta and decay before their functions), by head."""
        shape = self.shape
        inner, rates = self.inner(x), self.rates(x)
        if self.forget is not None and self.gate is not None:
            beta, decay, gate = (part.contiguous() for part in rates.split(shape.rate_rows, dim=-1))
            return inner, self.gate(gate), beta, self.forget(decay)
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
    inside, names, place = f"{prefix}{spec.block}.", spec.names, (slab,)
    layout.add("delta_in", place, tensors(inside, names.inner, spec.inner_rows, spec.by_key_head), hidden)
    layout.add("delta_rates", place, tensors(inside, names.rates, spec.rate_rows, spec.by_key_head), hidden)
    layout.add("delta_conv", place, tensors(inside, names.convolution, spec.inner_rows[:3]), (1, spec.taps))
    layout.add("delta_norm", place, [(f"{inside}{names.norm}.weight", spec.value_dim)], None)
    layout.add("delta_out", place, [(f"{inside}{names.output}.weight", hidden)], spec.values)
    layout.dtypes["delta_log"] = torch.float32
    if names.narrow is None:
        layout.add("delta_bias", place, [(f"{inside}dt_bias", spec.value_heads)], None)
        layout.add("delta_log", place, [(f"{inside}A_log", spec.value_heads)], None)
        return
    forget, gate = names.narrow
    layout.add("delta_forget", place, [(f"{inside}{forget}.weight", spec.keys)], spec.key_dim)
    layout.add("delta_gate", place, [(f"{inside}{gate}.weight", spec.values)], spec.value_dim)
    layout.add("delta_bias", place, [(f"{inside}dt_bias", spec.keys)], None)
    layout.add("delta_log", place, [(f"{inside}A_log", 1)], (1, spec.value_heads, 1))


def tensors(
    prefix: str, names: tuple[str, ...], rows: tuple[int, ...], by_head: bool = False
) -> list[tuple[str, Rows]]:
    """(name, rows) of each part; the first name is for all parts that have none of their own.

    `by_head`: the rows of one name are ordered by heads, which ranks divide, and not by parts.
    """
    together = len(rows) - len(names) + 1
    first: Rows = sum(rows[:together]) if by_head or together == 1 else rows[:together]
    sizes = (first, *rows[together:])
    return [(f"{prefix}{name}.weight", size) for name, size in zip(names, sizes, strict=True)]


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
        forget=linear(weights, "delta_forget", slab) if spec.names.narrow else None,
        gate=linear(weights, "delta_gate", slab) if spec.names.narrow else None,
        output=linear(weights, "delta_out", slab),
        weight=weights.slab("delta_conv", slab),
        decay_bias=weights.slab("delta_bias", slab),
        decay_log=weights.slab("delta_log", slab),
        norm=weights.slab("delta_norm", slab),
    )
