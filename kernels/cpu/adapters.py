"""What LoRA adapters add to the products of a step: b @ (a @ x) for the rows that have an adapter.

Rows are grouped by adapter. Each group multiplies with its own two small matrices, by the same routes as any other
product (linear.py), so a row's bits depend on its company no more than they do there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from quartet.kernels.cpu.linear import Linear, no_pause

Slab = tuple[str, tuple[int, ...]]  # names one weight


@dataclass(frozen=True, slots=True)
class Piece:
    """Adds expand(shrink(x)) to some columns of a product."""

    first: int  # column
    shrink: Linear  # (rank, in)
    expand: Linear  # (columns, rank)


AdapterWeights = Mapping[Slab, Sequence[Piece]]


def make_piece(
    first: int, a: torch.Tensor, b: torch.Tensor, keep_order: bool, yield_point: Callable[[], None] = no_pause
) -> Piece:
    """The factors a (rank, in) and b (columns, rank), packed. `keep_order`: see Linear.keep_order."""
    linears = Linear(a), Linear(b)
    for linear in linears:
        linear.adopt(linear.pack(linear.weight, yield_point))
        if keep_order:
            linear.keep_order()
    return Piece(first, *linears)


class StepAdapters:
    """The adapters of the step that is computed; none between steps."""

    def __init__(self) -> None:
        self.adapters: Sequence[AdapterWeights] = ()
        self.owners: torch.Tensor | None = None  # (rows,) int64: index of a row's adapter, or -1
        self.groups: list[tuple[AdapterWeights, torch.Tensor]] = []  # with the rows of each, of the product at hand

    @contextmanager
    def of_step(self, adapters: Sequence[AdapterWeights], owners: torch.Tensor) -> Iterator[None]:
        """Within it products add what these adapters have for their rows."""
        self.adapters, self.owners = adapters, owners
        self.select(None)
        try:
            yield
        finally:
            self.adapters, self.owners, self.groups = (), None, []

    def select(self, rows: torch.Tensor | None) -> None:
        """The next products are of these rows of the step only, in this order; None: of all."""
        if self.owners is None:
            return
        owners = self.owners if rows is None else self.owners[rows]
        found = [(weights, (owners == i).nonzero().flatten()) for i, weights in enumerate(self.adapters)]
        self.groups = [(weights, own) for weights, own in found if len(own)]

    def add(self, slab: Slab, x: torch.Tensor, y: torch.Tensor) -> None:
        """y (rows, out) += what the rows' adapters have for this weight; x (rows, in)."""
        for weights, rows in self.groups:
            pieces = weights.get(slab, ())
            own = x[rows] if pieces else x
            for piece in pieces:
                columns = y[:, piece.first : piece.first + len(piece.expand.weight)]
                columns.index_add_(0, rows, piece.expand(piece.shrink(own)))


def attach(followers: Sequence[tuple[Any, str, tuple[int, ...]]]) -> StepAdapters:
    """Have all these layers, each with the name of its weight, add what the adapters of a step have for them."""
    step = StepAdapters()
    for linear, buffer, index in followers:
        assert isinstance(linear, Linear)
        linear.adapters = step
        linear.slab = buffer, index
    return step
