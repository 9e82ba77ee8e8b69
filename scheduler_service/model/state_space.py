"""The state space of Mamba-2: spec, weights, and how torch computes it (Granite 4 H, Falcon-H1, Nemotron-H, Bamba)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from quartet.kernels.cpu import recurrent as native
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native.library import Library
from quartet.kernels.operations import Ops
from quartet.kernels.reference.recurrent import causal_convolution, state_space, state_space_by_chunks
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.deterministic import silu, softplus
from quartet.scheduler_service.model.state_access import StateAccess, StateSpec
from quartet.scheduler_service.weights.parameters import Layout, Weights

NormPlace = Literal["behind gates", "before gates", "none"]
FEW_TOKENS = 8  # up to so many are taken token by token


@dataclass(frozen=True, slots=True)
class StateSpaceSpec:
    """Values, keys and queries go through a short convolution, then through the state; gates scale the result."""

    taps: int
    heads: int
    head_dim: int
    groups: int  # of heads that share keys and queries
    state_dim: int
    epsilon: float
    convolution_bias: bool = True
    bias: bool = False  # of the product in front
    output_bias: bool = False
    norm: NormPlace = "behind gates"  # over a group's heads together
    least_step: float = 0.0
    most_step: float = math.inf
    norm_ranks: int = 1  # neighbours that have a part of one group each: its norm is over all of them
    factors: tuple[float, ...] | None = None  # of gates, values, keys, queries and steps
    output_factor: float = 1.0  # of what the output product reads
    block: str = "mamba"  # checkpoint names below the layer

    @property
    def values(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.groups * self.state_dim

    @property
    def channels(self) -> int:
        """Of the convolution: values, keys and queries."""
        return self.values + 2 * self.keys


@dataclass(frozen=True, slots=True)
class StateSpace:
    """The rows of `inner` are gates, values, keys, queries and steps."""

    shape: StateSpaceSpec
    spec: StateSpec
    inner: Linear
    output: Linear
    factors: torch.Tensor | None  # of the rows of `inner`
    weight: torch.Tensor  # (channels, 1, taps)
    bias: torch.Tensor | None  # (channels,)
    step_bias: torch.Tensor  # (heads,)
    decay_log: torch.Tensor  # (heads,) float32
    skip: torch.Tensor  # (heads,)
    norm: torch.Tensor | None  # (values,)
    parallel: Parallel  # the ranks among which heads are divided

    def mix(self, x: torch.Tensor, states: StateAccess, deterministic: bool) -> torch.Tensor:
        """x (tokens, hidden), normed, → (tokens, heads * head dim), in front of the output product."""
        shape = self.shape
        projected = self.inner(x)
        if self.factors is not None:
            projected = projected * self.factors
        gate, mixed, steps = projected.split((shape.values, shape.channels, shape.heads), dim=-1)
        known = native.can_run(x.dtype, shape.taps, shape.state_dim)
        if states.kernels is not None and known and not (self.norms_together and shape.norm == "before gates"):
            return self.mix_native(states.kernels, states, mixed, gate, steps)
        steps = softplus(steps.float() + self.step_bias.float()).clamp(shape.least_step, shape.most_step)
        rates, skip, weight = -self.decay_log.float().exp(), self.skip.float().unsqueeze(-1), self.weight.squeeze(1)

        def compute(inputs: torch.Tensor, window: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
            step = inputs[..., shape.channels :]
            values, window = causal_convolution(inputs[..., : shape.channels].to(x.dtype), window, weight, self.bias)
            value, key, query = (
                silu(values.to(x.dtype)).to(x.dtype).float().split((shape.values, shape.keys, shape.keys), dim=-1)
            )
            value = value.unflatten(-1, (shape.heads, -1))
            group = shape.heads // shape.groups
            heads = [part.unflatten(-1, (shape.groups, -1)).repeat_interleave(group, dim=2) for part in (key, query)]
            by_token = deterministic or value.shape[1] <= FEW_TOKENS
            scan = state_space if by_token else state_space_by_chunks
            y, state = scan(value * step.unsqueeze(-1), heads[0], heads[1], step * rates, state)
            return (y + value * skip).flatten(2), window, state

        def update(
            ops: Ops, rows: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor, *pools: torch.Tensor
        ) -> torch.Tensor:
            values, step = rows.split((shape.channels, shape.heads), dim=-1)
            convolved, out = x.new_empty(values.shape), rows.new_empty(len(rows), shape.values)
            ops.convolve_row(values.to(x.dtype), weight, self.bias, True, reads, writes, pools[0], convolved)
            step = step.contiguous()
            ops.space_update(convolved, step * rates, step, self.skip, reads, writes, pools[1], out)
            return out

        y = states.scan(self.spec.layer, compute, torch.cat((mixed.float(), steps), dim=-1), update)
        y = self.gated(y, silu(gate))
        return (y * shape.output_factor).to(x.dtype) if shape.output_factor != 1.0 else y.to(x.dtype)

    def mix_native(
        self, kernels: Library, states: StateAccess, mixed: torch.Tensor, gate: torch.Tensor, steps: torch.Tensor
    ) -> torch.Tensor:
        """The same by the kernels of the CPU, from the parts of the first product."""
        shape = self.shape
        window, state = states.pools[self.spec.layer]
        gates = native.Gates(gate, self.norm, shape.norm, shape.groups, shape.epsilon, factor=shape.output_factor)
        if self.norms_together:
            gates = native.Gates(gate, None, "none", shape.groups, shape.epsilon)
        y = native.state_space(
            kernels,
            states.table,
            mixed,
            native.Convolution(self.weight, self.bias, window),
            native.Decay(steps, self.step_bias, self.decay_log),
            (shape.least_step, shape.most_step),
            self.skip,
            state,
            gates,
        )
        return (self.normed(y.float()) * shape.output_factor).to(y.dtype) if self.norms_together else y

    def gated(self, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """y (tokens, values) float32, scaled by the gates and normed by group, in the order of the family."""
        if self.norm is None:
            return y * gates
        return self.normed(y * gates) if self.shape.norm == "behind gates" else self.normed(y) * gates

    @property
    def norms_together(self) -> bool:
        """Whether a group's heads, which are normed together, are divided among ranks."""
        return self.norm is not None and self.shape.norm_ranks > 1

    def normed(self, y: torch.Tensor) -> torch.Tensor:
        """y (tokens, values) float32, normed by group."""
        assert self.norm is not None
        if self.norms_together:
            return y * torch.rsqrt(self.mean_square(y) + self.shape.epsilon) * self.norm.float()
        grouped = y.unflatten(-1, (self.shape.groups, -1))
        return F.rms_norm(grouped, grouped.shape[-1:], None, self.shape.epsilon).flatten(-2) * self.norm.float()

    def mean_square(self, y: torch.Tensor) -> torch.Tensor:
        """Of all numbers of the group of which y (tokens, values) is this rank's part: (tokens, 1)."""
        together, parallel = self.shape.norm_ranks, self.parallel
        sums = y.new_zeros(len(y), parallel.size // together)  # (tokens, groups of all ranks)
        own = sums.narrow(1, parallel.rank // together, 1)
        own.copy_(y.square().sum(1, keepdim=True))
        total = parallel.sum(sums).narrow(1, parallel.rank // together, 1)
        return total / (y.shape[1] * together)


def add_state_space(layout: Layout, spec: StateSpaceSpec, hidden: int, slab: int, prefix: str) -> None:
    """Places for one layer's weights; `slab`: its number among recurrent layers."""
    inside, convolved = f"{prefix}{spec.block}.", (spec.values, spec.keys, spec.keys)
    rows = spec.values, *convolved, spec.heads
    layout.add("space_in", (slab,), [(f"{inside}in_proj.weight", rows)], hidden)
    if spec.bias:
        layout.add("space_in_bias", (slab,), [(f"{inside}in_proj.bias", rows)], None)
    layout.add("space_conv", (slab,), [(f"{inside}conv1d.weight", convolved)], (1, spec.taps))
    if spec.convolution_bias:
        layout.add("space_conv_bias", (slab,), [(f"{inside}conv1d.bias", convolved)], None)
    layout.add("space_step_bias", (slab,), [(f"{inside}dt_bias", spec.heads)], None)
    layout.add("space_decay_log", (slab,), [(f"{inside}A_log", spec.heads)], None)
    layout.dtypes["space_decay_log"] = torch.float32
    layout.add("space_skip", (slab,), [(f"{inside}D", spec.heads)], None)
    if spec.norm != "none":
        layout.add("space_norm", (slab,), [(f"{inside}norm.weight", spec.values)], None)
    layout.add("space_out", (slab,), [(f"{inside}out_proj.weight", hidden)], spec.values)
    if spec.output_bias:
        layout.add("space_out_bias", (slab,), [(f"{inside}out_proj.bias", hidden)], None)


def state_space_mixer(
    spec: StateSpaceSpec, weights: Weights, layer: int, slab: int, linear: Callable[..., Linear]
) -> StateSpace:
    """The mixer of a layer; `linear` makes a product of a slab that follows updates of the weights."""
    shapes = (spec.taps - 1, spec.channels), (spec.heads, spec.state_dim, spec.head_dim)
    factors = None
    if spec.factors is not None:
        counts = torch.tensor((spec.values, spec.values, spec.keys, spec.keys, spec.heads))
        factors = torch.tensor(spec.factors).repeat_interleave(counts).to(weights.device, weights.dtype)
    return StateSpace(
        shape=spec,
        spec=StateSpec(layer, shapes, (weights.dtype, torch.float32)),
        inner=linear(weights, "space_in", slab, bias=spec.bias),
        output=linear(weights, "space_out", slab, bias=spec.output_bias),
        factors=factors,
        weight=weights.slab("space_conv", slab),
        bias=weights.slab("space_conv_bias", slab) if spec.convolution_bias else None,
        step_bias=weights.slab("space_step_bias", slab),
        decay_log=weights.slab("space_decay_log", slab),
        skip=weights.slab("space_skip", slab),
        norm=weights.slab("space_norm", slab) if spec.norm != "none" else None,
        parallel=weights.layout.parallel,
    )
