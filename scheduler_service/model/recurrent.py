"""Layers that mix tokens by a recurrence instead of attention: specs, weights, and how torch computes them.

What such a layer knows of earlier tokens is a state of fixed size for each sequence (`StateSpec`). A step says for each
of its sequences where that state is read and written (`StateAccess`): decode rows are computed together, the runs of
prompts one after another, since a run may begin with the state that the one before has left.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.reference.recurrent import causal_convolution
from quartet.scheduler_service.weights.parameters import Layout, Weights


@dataclass(frozen=True, slots=True)
class ShortConvSpec:
    """output(c * convolution(b * x)), with b, c and x from one product; the convolution is short and causal."""

    taps: int  # tokens that the convolution reads
    bias: bool = False
    block: str = "conv"  # checkpoint names below the layer


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What a layer keeps of a sequence: tensors of these shapes and types."""

    layer: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def nbytes(self) -> int:
        """Of one state."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in pairs)


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [first, last) of one sequence; the state in front of them, and where the one behind them goes."""

    first: int
    last: int
    read: int  # row of the state pools
    write: int


@dataclass(slots=True)
class StateAccess:
    """Where the states of a step's sequences are. The first tokens of the step are decode rows, then come the runs."""

    pools: dict[int, tuple[torch.Tensor, ...]]  # by layer, each (rows, *shape)
    reads: torch.Tensor  # (decode rows,) int64
    writes: torch.Tensor  # (decode rows,) int64
    runs: list[Run]  # in the order in which they have to be computed

    def scan(self, layer: int, compute: Callable[..., tuple[torch.Tensor, ...]], x: torch.Tensor) -> torch.Tensor:
        """Take all tokens x (tokens, width) through their states: (tokens, width of the result).

        `compute` maps x (sequences, tokens, width) and states (sequences, *shape) to y and the new states.
        """
        pools, decodes = self.pools[layer], len(self.reads)
        parts: list[torch.Tensor] = []
        if decodes:
            y, *states = compute(x[:decodes].unsqueeze(1), *(pool[self.reads] for pool in pools))
            for pool, state in zip(pools, states, strict=True):
                pool[self.writes] = state
            parts.append(y.squeeze(1))
        for run in self.runs:
            read = slice(run.read, run.read + 1)
            y, *states = compute(x[run.first : run.last].unsqueeze(0), *(pool[read] for pool in pools))
            for pool, state in zip(pools, states, strict=True):
                pool[run.write] = state[0]
            parts.append(y.squeeze(0))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A short convolution with gates before and after it. The rows of `inner` are b, c and x."""

    spec: StateSpec
    inner: Linear
    output: Linear
    weight: torch.Tensor  # (channels, 1, taps)
    bias: torch.Tensor | None  # (channels,)

    def mix(self, x: torch.Tensor, states: StateAccess) -> torch.Tensor:
        """x (tokens, hidden), normed, → (tokens, channels), in front of the output product."""
        before, after, inputs = self.inner(x).chunk(3, dim=-1)
        weight = self.weight.squeeze(1)

        def compute(values: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, state = causal_convolution(values, state, weight, self.bias)
            return y.to(x.dtype), state

        return after * states.scan(self.spec.layer, compute, before * inputs)


Mixer = ShortConv


def add_recurrent(layout: Layout, spec: ShortConvSpec, hidden: int, slab: int, prefix: str) -> None:
    """Places for one recurrent layer's weights; `slab`: its number among them."""
    inside = f"{prefix}{spec.block}."
    layout.add("conv_in", (slab,), [(f"{inside}in_proj.weight", 3 * hidden)], hidden)
    layout.add("conv", (slab,), [(f"{inside}conv.weight", hidden)], (1, spec.taps))
    layout.add("conv_out", (slab,), [(f"{inside}out_proj.weight", hidden)], hidden)
    if spec.bias:
        layout.add("conv_in_bias", (slab,), [(f"{inside}in_proj.bias", 3 * hidden)], None)
        layout.add("conv_bias", (slab,), [(f"{inside}conv.bias", hidden)], None)
        layout.add("conv_out_bias", (slab,), [(f"{inside}out_proj.bias", hidden)], None)


def recurrent_mixer(
    spec: ShortConvSpec, weights: Weights, layer: int, slab: int, linear: Callable[..., Linear]
) -> Mixer:
    """The mixer of a layer; `linear` makes a product of a slab that follows updates of the weights."""
    channels = len(weights.slab("conv", slab))
    return ShortConv(
        spec=StateSpec(layer, ((spec.taps - 1, channels),), (weights.dtype,)),
        inner=linear(weights, "conv_in", slab, bias=spec.bias),
        output=linear(weights, "conv_out", slab, bias=spec.bias),
        weight=weights.slab("conv", slab),
        bias=weights.slab("conv_bias", slab) if spec.bias else None,
    )
