"""Layers that mix tokens by a recurrence instead of attention: specs, weights, and how torch computes them.

Here are short convolutions and the choice between all kinds; the gated delta rule is in gated_delta.py, the state space
of Mamba-2 in state_space.py. What a layer keeps of a sequence is said by its `StateSpec` (state_access.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quartet.kernels.cpu import recurrent as native
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.operations import Ops
from quartet.kernels.reference.recurrent import causal_convolution
from quartet.scheduler_service.model.gated_delta import GatedDelta, GatedDeltaSpec, add_gated_delta, gated_delta
from quartet.scheduler_service.model.state_access import StateAccess, StateSpec
from quartet.scheduler_service.model.state_space import StateSpace, StateSpaceSpec, add_state_space, state_space_mixer
from quartet.scheduler_service.weights.parameters import Layout, Weights


@dataclass(frozen=True, slots=True)
class ShortConvSpec:
    """output(c * convolution(b * x)), with b, c and x from one product; the convolution is short and causal."""

    channels: int
    taps: int  # tokens that the convolution reads
    bias: bool = False
    block: str = "conv"  # checkpoint names below the layer


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A short convolution with gates before and after it. The rows of `inner` are b, c and x."""

    spec: StateSpec
    inner: Linear
    output: Linear
    weight: torch.Tensor  # (channels, 1, taps)
    bias: torch.Tensor | None  # (channels,)

    def mix(self, x: torch.Tensor, states: StateAccess, deterministic: bool) -> torch.Tensor:
        """x (tokens, hidden), normed, → (tokens, channels), in front of the output product."""
        before, after, inputs = self.inner(x).chunk(3, dim=-1)
        if states.kernels is not None and native.can_run(x.dtype, self.weight.shape[-1]):
            (window,) = states.pools[self.spec.layer]
            convolution = native.Convolution(self.weight, self.bias, window)
            return native.short_convolution(states.kernels, states.table, inputs, before, after, convolution)
        weight = self.weight.squeeze(1)

        def compute(values: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, state = causal_convolution(values, state, weight, self.bias)
            return y.to(x.dtype), state

        def update(
            ops: Ops, values: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor, window: torch.Tensor
        ) -> torch.Tensor:
            out = values.new_empty(values.shape)
            ops.convolve_row(values, weight, self.bias, False, reads, writes, window, out)
            return out

        return after * states.scan(self.spec.layer, compute, before * inputs, update)


Mixer = ShortConv | GatedDelta | StateSpace
RecurrentSpec = ShortConvSpec | GatedDeltaSpec | StateSpaceSpec


def add_recurrent(layout: Layout, spec: RecurrentSpec, hidden: int, slab: int, prefix: str) -> None:
    """Places for one recurrent layer's weights; `slab`: its number among them."""
    match spec:
        case GatedDeltaSpec():
            add_gated_delta(layout, spec, hidden, slab, prefix)
        case StateSpaceSpec():
            add_state_space(layout, spec, hidden, slab, prefix)
        case ShortConvSpec():
            add_short_conv(layout, spec, hidden, slab, prefix)


def add_short_conv(layout: Layout, spec: ShortConvSpec, hidden: int, slab: int, prefix: str) -> None:
    """The same for a short convolution."""
    inside, channels = f"{prefix}{spec.block}.", spec.channels
    layout.add("conv_in", (slab,), [(f"{inside}in_proj.weight", (channels,) * 3)], hidden)
    layout.add("conv", (slab,), [(f"{inside}conv.weight", channels)], (1, spec.taps))
    layout.add("conv_out", (slab,), [(f"{inside}out_proj.weight", hidden)], channels)
    if spec.bias:
        layout.add("conv_in_bias", (slab,), [(f"{inside}in_proj.bias", (channels,) * 3)], None)
        layout.add("conv_bias", (slab,), [(f"{inside}conv.bias", channels)], None)
        layout.add("conv_out_bias", (slab,), [(f"{inside}out_proj.bias", hidden)], None)


def recurrent_mixer(
    spec: RecurrentSpec, weights: Weights, layer: int, slab: int, linear: Callable[..., Linear]
) -> Mixer:
    """The mixer of a layer; `linear` makes a product of a slab that follows updates of the weights."""
    match spec:
        case GatedDeltaSpec():
            return gated_delta(spec, weights, layer, slab, linear)
        case StateSpaceSpec():
            return state_space_mixer(spec, weights, layer, slab, linear)
        case ShortConvSpec():
            return short_conv(spec, weights, layer, slab, linear)


def short_conv(
    spec: ShortConvSpec, weights: Weights, layer: int, slab: int, linear: Callable[..., Linear]
) -> ShortConv:
    """The same for a short convolution."""
    return ShortConv(
        spec=StateSpec(layer, ((spec.taps - 1, spec.channels),), (weights.dtype,)),
        inner=linear(weights, "conv_in", slab, bias=spec.bias),
        output=linear(weights, "conv_out", slab, bias=spec.bias),
        weight=weights.slab("conv", slab),
        bias=weights.slab("conv_bias", slab) if spec.bias else None,
    )
