"""What some layers have besides attention and a feed-forward block: an input of their own, several residual streams.

native/layers.c has the order of operations.
"""

import ctypes
from dataclasses import dataclass

import torch

from quartet.kernels.cpu import arguments
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native import structures
from quartet.kernels.cpu.native.library import NormWeight

MOST_STREAMS, LANES = 16, 16


@dataclass(frozen=True, slots=True)
class OwnInput:
    """What a layer adds to its result: norm(projection(activation(gate(result)) * its part of the inputs))."""

    gate: Linear  # (size, hidden)
    projection: Linear  # (hidden, size)
    norm: NormWeight
    activation: str  # of native.ACTIVATIONS

    def check(self, hidden: int) -> None:
        """Raise AssertionError unless all parts belong together. C code trusts them."""
        arguments.check_linear(self.gate, len(self.gate.weight), hidden)
        arguments.check_linear(self.projection, hidden, len(self.gate.weight))
        arguments.check_norm(self.norm, hidden)

    def fill(self, structure: structures.Layer) -> None:
        """Describe it with the addresses that its weights have now."""
        structure.input_gate = arguments.product(self.gate, "bf16", activation=self.activation)
        structure.input_projection = arguments.product(self.projection, "bf16")
        structure.after_input = arguments.norm_argument(self.norm)


@dataclass(frozen=True, slots=True)
class OwnStreams:
    """What a layer has where it reads one of several residual streams, and a product of low rank beside attention."""

    count: int
    active: int
    router: Linear  # (count, hidden)
    router_norm: NormWeight
    predictions: torch.Tensor  # (count * count, count)
    corrections: torch.Tensor  # (count, count)
    scale: torch.Tensor | None  # (hidden,)
    before: NormWeight  # of the product beside attention
    left: Linear  # (rank, hidden)
    right: Linear  # (hidden, rank)
    after: NormWeight

    @property
    def linears(self) -> list[Linear]:
        return [self.router, self.left, self.right]

    @property
    def norms(self) -> list[NormWeight]:
        return [self.router_norm, self.before, self.after]

    @property
    def vectors(self) -> list[torch.Tensor]:
        """Its other weights."""
        return [self.predictions, self.corrections, *([] if self.scale is None else [self.scale])]

    def can_run(self) -> bool:
        """Whether the kernels know so many streams of this width."""
        return 1 < self.count <= MOST_STREAMS and self.router.weight.shape[1] % LANES == 0

    def check(self, hidden: int) -> None:
        """Raise AssertionError unless all parts belong together. C code trusts them."""
        assert 0 <= self.active < self.count, (self.active, self.count)
        arguments.check_linear(self.router, self.count, hidden)
        arguments.check_linear(self.left, len(self.left.weight), hidden)
        arguments.check_linear(self.right, hidden, len(self.left.weight))
        for norm in self.norms:
            arguments.check_norm(norm, hidden)
        shapes = (self.count * self.count, self.count), (self.count, self.count), (hidden,)
        for vector, shape in zip(self.vectors, shapes, strict=False):
            assert vector.shape == shape and vector.dtype is torch.bfloat16 and vector.is_contiguous(), vector.shape

    def fill(self, structure: structures.Layer) -> None:
        """Describe it with the addresses that its weights have now."""
        structure.streams = ctypes.pointer(
            structures.Streams(
                count=self.count,
                active=self.active,
                router=arguments.product(self.router, "float", self.router_norm),
                predictions=self.predictions.data_ptr(),
                corrections=self.corrections.data_ptr(),
                scale=None if self.scale is None else self.scale.data_ptr(),
                before=arguments.norm_argument(self.before),
                after=arguments.norm_argument(self.after),
                left=arguments.product(self.left, "bf16"),
                right=arguments.product(self.right, "bf16"),
            )
        )
