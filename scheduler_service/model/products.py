"""Matrix products on fused operations, by the route for their number of rows, and the scratch memory they share.

The routes differ in the order of their sums. Where that must not depend on the number of rows (`steady`), all rows go
through the skinny products, in blocks of one size.

What LoRA adapters have is added behind a product. So in a step with adapters nothing is fused that would go on with a
product: norms come before it, gates behind it. With `steady` it is so in all steps: a row's bits must not depend on
whether another row has an adapter.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.operations import Ops
from quartet.kernels.ops import Implementation
from quartet.kernels.triton.configs import FEW_ROWS, SKINNY_ROWS, STEADY_ROWS
from quartet.scheduler_service.model.fused_adapters import FusedAdapters

Sizes = Callable[..., tuple[int, int]]  # elements of partial sums and of counters


class Workspace:
    """Scratch memory of operations that add up partial results. They follow one another, so they share it."""

    def __init__(self, implementation: Implementation, device: torch.device, block: int | None = None) -> None:
        """`block`: rows that a skinny product computes at once, if that is fixed."""
        self.device = device
        self.counters = torch.zeros(1, dtype=torch.int32, device=device)
        self.decode, self.skinny = sizes_of(implementation, block)

    def reserve(self, counters: int) -> None:
        """Have at least so many counters. Before anything is recorded: recorded work keeps the address."""
        if counters > len(self.counters):
            self.counters = torch.zeros(counters, dtype=torch.int32, device=self.device)

    def partials(self, sizes: tuple[int, int]) -> torch.Tensor:
        assert sizes[1] <= len(self.counters), sizes
        return torch.empty(sizes[0], dtype=torch.float32, device=self.device)


def sizes_of(implementation: Implementation, block: int | None) -> tuple[Sizes, Sizes]:
    """What paged decode and the skinny products need; plain torch needs nothing."""
    if implementation == "torch":
        return lambda *_: (0, 0), lambda *_: (0, 0)
    from quartet.kernels.triton.attention_decode import decode_workspace  # triton is not there on every machine
    from quartet.kernels.triton.skinny import skinny_workspace

    return decode_workspace, partial(skinny_workspace, block=block)


class Products:
    """x @ weight.T by the route for its number of rows; with `steady`, by one route for all."""

    def __init__(
        self, ops: Ops, workspace: Workspace, steady: bool = False, adapters: FusedAdapters | None = None
    ) -> None:
        """`adapters`: what those of a step add."""
        self.ops = ops
        self.adapters = adapters
        self.workspace = workspace
        self.steady = steady
        self.most_at_once = STEADY_ROWS if steady else SKINNY_ROWS
        self.block = SKINNY_ROWS if steady else None

    def reserve(self, linear: Linear, gated: bool = False) -> None:
        """Have room for the products with this weight."""
        size = len(linear.weight) // (2 if gated else 1)
        self.workspace.reserve(self.workspace.skinny(self.most_at_once, size, linear.weight.shape[1], gated)[1])
        if gated and self.adapters is not None:  # which are added before the gate
            self.reserve(linear)

    @property
    def adds_adapters(self) -> bool:
        """Whether products are computed one by one, for adapters to be added."""
        return self.adapters is not None and (self.steady or self.adapters.step is not None)

    def adapt(self, x: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
        """out (tokens, out) += what the tokens' adapters have for a layer's weight; x (tokens, in)."""
        if self.adapters is not None:
            self.adapters.add(x, linear, out)

    def few(self, x: torch.Tensor) -> bool:
        """Whether rows are so few that the multiply-add units do."""
        return len(x) <= FEW_ROWS and not self.steady

    def many(self, x: torch.Tensor) -> bool:
        """Whether rows are so many that cuBLAS does."""
        return len(x) > SKINNY_ROWS and not self.steady

    def scratch(self, x: torch.Tensor, size: int, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = self.workspace.skinny(len(x), size, x.shape[1], gated)
        return self.workspace.partials(sizes), self.workspace.counters

    def __call__(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """(tokens, in) → (tokens, out)."""
        if self.many(x):
            out = F.linear(x, linear.weight, linear.bias)
        else:
            out = x.new_empty(len(x), len(linear.weight))
            self.small(x, linear, None, out)
        self.adapt(x, linear, out)
        return out

    def write(self, x: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
        """The same into `out`, which may have another dtype."""
        if self.many(x):
            out.copy_(F.linear(x, linear.weight, linear.bias))
        else:
            self.small(x, linear, None, out)
        self.adapt(x, linear, out)

    def add(self, x: torch.Tensor, linear: Linear, residual: torch.Tensor) -> None:
        """residual (tokens, out) += the product."""
        if not self.many(x):
            self.small(x, linear, residual, residual)
        else:
            residual.addmm_(x, linear.weight.t())
            if linear.bias is not None:
                residual.add_(linear.bias)
        self.adapt(x, linear, residual)

    def small(self, x: torch.Tensor, linear: Linear, residual: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = linear(x) + residual, for row counts below those of cuBLAS."""
        if self.few(x):
            self.ops.gemv(x, linear.weight, linear.bias, residual, out)
            return
        for first in range(0, len(x), self.most_at_once):
            rows = slice(first, first + self.most_at_once)
            scratch = self.scratch(x[rows], out.shape[1], gated=False)
            added = None if residual is None else residual[rows]
            self.ops.skinny(x[rows], linear.weight, linear.bias, added, *scratch, out[rows], self.block)

    def gated(self, x: torch.Tensor, linear: Linear, activation: str) -> torch.Tensor:
        """activation(gate) * up of x (tokens, in)."""
        size = len(linear.weight) // 2
        out = x.new_empty(len(x), size)
        if self.adds_adapters:
            self.ops.gated_activation(self(x, linear), activation, out)
        elif self.few(x):
            self.ops.norm_gate_up(x, None, 0.0, False, linear.weight, linear.bias, activation, out)
        elif self.many(x):
            self.ops.gated_activation(F.linear(x, linear.weight, linear.bias), activation, out)
        else:
            for first in range(0, len(x), self.most_at_once):
                rows = slice(first, first + self.most_at_once)
                scratch = self.scratch(x[rows], size, gated=True)
                self.ops.skinny_gated(x[rows], linear.weight, linear.bias, activation, *scratch, out[rows], self.block)
        return out
