"""What LoRA adapters add to the products of a step: b @ (a @ x) for the rows that have an adapter.

Rows are grouped by adapter. Each group multiplies with its own two small matrices, by the same routes as any other
product (linear.py), so a row's bits depend on its company no more than they do there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from quartet.kernels.cpu.linear import Linear, no_pause

Slab = tuple[str, tuple[int, ...]]  # names one weight


@dataclass(frozen=True, slots=True)
class Addition:
    """What one adapter adds to neighbouring columns of a product: all that it has for a weight, in two products."""

    first: int  # column
    width: int
    shrink: Linear  # (ranks, in)
    expand: Linear  # (width, ranks)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) → (rows, width)."""
        return self.expand(self.shrink(x))


AdapterWeights = Mapping[Slab, Addition]
Factors = tuple[int, torch.Tensor, torch.Tensor]  # first column, a (rank, in), b (columns, rank)


def make_addition(factors: Sequence[Factors], keep_order: bool, yield_point: Callable[[], None] = no_pause) -> Addition:
    """The factors that an adapter has for parts of one weight, packed together. `keep_order`: see Linear.keep_order.

    The second factors stand on the diagonal of one matrix, whose zeros change no sum: few products cost less than
    small ones.
    """
    first = min(start for start, _, _ in factors)
    width = max(start + len(b) for start, _, b in factors) - first
    a = torch.cat([a for _, a, _ in factors])
    b = a.new_zeros(width, len(a))
    rank = 0
    for start, _, its in factors:
        b[start - first : start - first + len(its), rank : rank + its.shape[1]] = its
        rank += its.shape[1]
    linears = Linear(a), Linear(b)
    for linear in linears:
        linear.adopt(linear.pack(linear.weight, yield_point))
        if keep_order:
            linear.keep_order()
    return Addition(first, width, *linears)


class Group(NamedTuple):
    """The rows of a product that one adapter has."""

    weights: AdapterWeights
    rows: torch.Tensor  # (rows,) int64, ascending
    together: slice | None  # the same where they are neighbours


def group(weights: AdapterWeights, rows: torch.Tensor) -> Group:
    first, last = int(rows[0]), int(rows[-1])
    return Group(weights, rows, slice(first, last + 1) if last - first + 1 == len(rows) else None)


class StepAdapters:
    """The adapters of the step that is computed; none between steps."""

    def __init__(self) -> None:
        self.adapters: Sequence[AdapterWeights] = ()
        self.owners: torch.Tensor | None = None  # (rows,) int64: index of a row's adapter, or -1
        self.groups: list[Group] = []  # of the product at hand

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
        self.groups = [group(weights, own) for weights, own in found if len(own)]

    def add(self, slab: Slab, x: torch.Tensor, y: torch.Tensor) -> None:
        """y (rows, out) += what the rows' adapters have for this weight; x (rows, in)."""
        for weights, rows, together in self.groups:
            addition = weights.get(slab)
            if addition is None:
                continue
            columns = y[:, addition.first : addition.first + addition.width]
            if together is not None:
                columns[together] += addition(x[together])
            else:
                columns.index_add_(0, rows, addition(x[rows]))


def attach(followers: Sequence[tuple[Any, str, tuple[int, ...]]]) -> StepAdapters:
    """Have all these layers, each with the name of its weight, add what the adapters of a step have for them."""
    step = StepAdapters()
    for linear, buffer, index in followers:
        assert isinstance(linear, Linear)
        linear.adapters = step
        linear.slab = buffer, index
    return step
