"""How a decoder computes: the operations of a layer, as one kind of device does them best.

The decoder (decoder.py) says which operations follow one another, once. A backend decides how they are done and which
of them share a kernel. It is a value: a model runs on the one it is given, and nothing asks for the device again.

`TorchBackend` runs torch's own operations on any device, with packed weights on a CPU. `CpuBackend` runs our own
kernels for bfloat16 on a CPU, and `FusedBackend` the fused operations of `kernels/ops.py` on a GPU.
"""

from typing import Protocol

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.scheduler_service.model.batch import Attend, PagedContext
from quartet.scheduler_service.model.layers import Attention, DecoderLayer, Moe, Norm
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and signed sines, each (tokens, 1, rotary_dim)


class Backend(Protocol):
    """The operations of a decoder. The residual stream (tokens, hidden) is changed in place."""

    deterministic: bool  # the bits of a token's result do not depend on the other requests of its step

    def reserve(self, layers: list[DecoderLayer], lm_head: Linear | None) -> None:
        """Allocate scratch memory for these weights; call before the first step."""
        ...

    def rotations(self, positions: torch.Tensor) -> list[Rotation]:
        """For each rope of the model, the rotation of the tokens at `positions` (tokens,)."""
        ...

    def normed(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """norm(x); x itself without a norm."""
        ...

    def run_layers(
        self,
        layers: list[DecoderLayer],
        residual: torch.Tensor,
        rotations: list[Rotation],
        context: Attend | PagedContext,
        inputs: torch.Tensor | None = None,
        stack: torch.Tensor | None = None,
        final: Norm | None = None,
    ) -> torch.Tensor | None:
        """Compute all layers at once, where that is possible; None: nothing was done, compute them one by one.

        Returns the residual stream, which is changed in place; where the context says which tokens are wanted, perhaps
        that of these alone.
        `inputs`: the layers' own (layers, tokens, size), if they have such. `stack`: all residual streams (tokens,
        count, hidden) where there are several; it is changed then, and `residual` is of no use behind. `final`: a norm
        of the result, where there is one stream.
        """
        ...

    def attend(
        self,
        residual: torch.Tensor,
        norm: Norm | None,
        attention: Attention,
        rotation: Rotation,
        context: Attend | PagedContext,
        query_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Project norm(residual), rotate, write keys and values to the context, attend: (tokens, heads * head_dim).

        Rotated queries are multiplied with `query_scale` (tokens, 1, 1), if there is one.
        """
        ...

    def add_product(self, residual: torch.Tensor, x: torch.Tensor, linear: Linear, norm: Norm | None) -> None:
        """residual += norm(linear(x))."""
        ...

    def gate_up(self, residual: torch.Tensor, norm: Norm | None, gate_up: Linear, activation: str) -> torch.Tensor:
        """activation(gate) * up, the halves of gate_up(norm(residual)): (tokens, size)."""
        ...

    def gated(self, gate: torch.Tensor, factor: torch.Tensor, activation: str) -> torch.Tensor:
        """activation(gate) * factor, all (tokens, size)."""
        ...

    def add_experts(self, residual: torch.Tensor, before: Norm | None, moe: Moe, after: Norm | None) -> torch.Tensor:
        """residual += after(moe(before(residual))); the chosen experts (tokens, top_k), best first."""
        ...

    def write_logits(
        self, hidden: torch.Tensor, lm_head: Linear, scale: float, softcap: float | None, out: torch.Tensor
    ) -> None:
        """out (rows, vocab) float32 = lm_head(hidden (rows, hidden)), times `scale`, soft-capped."""
        ...

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        """One token per row of logits (rows, vocab): mask, temperature, filters and the draw.

        `allowed` is a bit mask, int32 (rows, ceil(vocab / 32)): bit i % 32 of word i // 32 allows token i. Logits may
        be overwritten; with `keep_logits` they are left as they were drawn from: masked, divided by the temperature.
        """
        ...
