"""What LoRA adapters add to the products of a step: b @ (a @ x) for the rows that have an adapter.

Rows are grouped by adapter. Each group multiplies with its own two small matrices, by the same routes as any other
product (linear.py), so a row's bits depend on its company no more than they do there.

Few rows of several adapters cost as many passes over small matrices as there are adapters. So the adapters that steps
have in common are combined: their first factors are stacked, and so are their second ones; two products serve all
rows, and between them a row keeps only what its own adapter gave. A few weights are combined before each step, until
all are. This is left out where a row's bits must not depend on its company.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from quartet.kernels.cpu.linear import Linear, no_pause
from quartet.kernels.cpu.native.library import NormWeight

Slab = tuple[str, tuple[int, ...]]  # names one weight

MADE_A_STEP = 1 << 22  # numbers that are combined in one step, and the last weight's: a few milliseconds
MOST_ROWS = 64  # that are computed with combined adapters; more are worth a pass for each adapter


@dataclass(frozen=True, slots=True)
class Addition:
    """What one adapter adds to neighbouring columns of a product: all that it has for a weight, in two products."""

    first: int  # column
    width: int
    shrink: Linear  # (ranks, in)
    expand: Linear  # (width, ranks)

    @property
    def rank(self) -> int:
        """Of all parts together."""
        return len(self.shrink.weight)

    @property
    def size(self) -> int:
        """Numbers of both factors."""
        return self.shrink.weight.numel() + self.expand.weight.numel()

    def shrunk(self, x: torch.Tensor, norm: NormWeight | None) -> torch.Tensor:
        """shrink(norm(x)) (rows, ranks)."""
        if norm is None:
            return self.shrink(x)
        inner = x.new_empty(len(x), self.rank)
        self.shrink.multiply_native(x, inner, "bf16", norm=norm)
        return inner

    def add(self, inner: torch.Tensor, y: torch.Tensor) -> None:
        """y (rows, out) += expand(inner), in the columns that this changes; inner (rows, ranks)."""
        columns = y[:, self.first : self.first + self.width]
        if self.expand.has_kernel:
            self.expand.multiply_native(inner, columns, "add")
        else:
            columns += self.expand(inner)


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


class Stacked(NamedTuple):
    """What several adapters have for one weight, as if it were one adapter's."""

    addition: Addition
    ranks: tuple[int, ...]  # of each; 0: it has nothing for this weight


class Combined:
    """Several adapters as one; its weights are made one by one."""

    def __init__(self, members: Sequence[AdapterWeights]) -> None:
        self.members = tuple(members)
        self.made: dict[Slab, Stacked | None] = {}  # None: no member has anything for it

    def place(self, weights: AdapterWeights) -> int | None:
        """Its number among the members."""
        return next((i for i, member in enumerate(self.members) if member is weights), None)

    def make(self, slab: Slab) -> Stacked | None:
        """Stack what the members have for a weight."""
        additions = [member.get(slab) for member in self.members]
        factors = [(one.first, one.shrink.weight, one.expand.weight) for one in additions if one is not None]
        ranks = tuple(0 if one is None else one.rank for one in additions)
        self.made[slab] = Stacked(make_addition(factors, False), ranks) if factors else None
        return self.made[slab]


class StepAdapters:
    """The adapters of the step that is computed; none between steps."""

    def __init__(self, combines: bool = False) -> None:
        """`combines`: rows of several adapters may share products."""
        self.combines = combines
        self.adapters: Sequence[AdapterWeights] = ()
        self.owners: torch.Tensor | None = None  # (rows,) int64: index of a row's adapter, or -1
        self.groups: list[Group] = []  # of the product at hand
        self.combined: Combined | None = None  # of late steps
        self.places: torch.Tensor | None = None  # of the step's adapters among its members; None: they share nothing
        self.left_to_make = 0  # numbers that may be combined in this step
        self.members: torch.Tensor | None = None  # (rows, 1): each row's place, or -1; None: they share nothing
        self.hidden: dict[tuple[int, ...], torch.Tensor] = {}  # by the ranks: (rows, ranks) bool, what is not a row's

    @contextmanager
    def of_step(self, adapters: Sequence[AdapterWeights], owners: torch.Tensor) -> Iterator[None]:
        """Within it products add what these adapters have for their rows."""
        self.adapters, self.owners, self.left_to_make = adapters, owners, MADE_A_STEP
        self.places = self.find_places() if self.combines and len(adapters) > 1 else None
        self.select(None)
        try:
            yield
        finally:
            self.adapters, self.owners, self.groups, self.members = (), None, [], None

    def find_places(self) -> torch.Tensor:
        """The step's adapters among those combined; combine these from now on if that suits badly."""
        suits = self.combined is not None and len(self.combined.members) <= 2 * len(self.adapters)
        found = [self.combined.place(weights) for weights in self.adapters] if suits and self.combined else []
        places = [place for place in found if place is not None]
        if len(places) < len(self.adapters):
            self.combined, places = Combined(self.adapters), list(range(len(self.adapters)))
        return torch.tensor([*places, -1])  # a row without an adapter has the last

    def forget(self, weights: AdapterWeights) -> None:
        """An adapter leaves memory."""
        if self.combined is not None and self.combined.place(weights) is not None:
            self.combined = None

    def select(self, rows: torch.Tensor | None) -> None:
        """The next products are of these rows of the step only, in this order; None: of all."""
        if self.owners is None:
            return
        owners = self.owners if rows is None else self.owners[rows]
        found = [(weights, (owners == i).nonzero().flatten()) for i, weights in enumerate(self.adapters)]
        self.groups = [group(weights, own) for weights, own in found if len(own)]
        shared = self.places is not None and len(self.groups) > 1 and len(owners) <= MOST_ROWS
        self.members = self.places[owners].unsqueeze(1) if shared and self.places is not None else None
        self.hidden = {}

    def add(self, slab: Slab, x: torch.Tensor, y: torch.Tensor, norm: NormWeight | None = None) -> None:
        """y (rows, out) += what the rows' adapters have for this weight; x (rows, in).

        `norm`: of x before the product, where the adapters' factors have kernels of our own.
        """
        if self.members is not None and self.add_combined(slab, x, y, self.members, norm):
            return
        for weights, rows, together in self.groups:
            addition = weights.get(slab)
            if addition is None:
                continue
            if together is not None:
                addition.add(addition.shrunk(x[together], norm), y[together])
            else:
                own = y[rows]
                addition.add(addition.shrunk(x[rows], norm), own)
                y[rows] = own

    def add_combined(
        self, slab: Slab, x: torch.Tensor, y: torch.Tensor, members: torch.Tensor, norm: NormWeight | None
    ) -> bool:
        """The same for all rows at once; False where this weight was not yet combined."""
        combined = self.combined
        assert combined is not None
        if slab in combined.made:
            stacked = combined.made[slab]
        elif self.left_to_make > 0:
            stacked = combined.make(slab)
            self.left_to_make -= stacked.addition.size if stacked else 0
        else:
            return False
        if stacked is None:
            return True
        inner = stacked.addition.shrunk(x, norm)
        stacked.addition.add(inner.masked_fill_(self.hidden_of(stacked.ranks, members), 0.0), y)
        return True

    def hidden_of(self, ranks: tuple[int, ...], members: torch.Tensor) -> torch.Tensor:
        """Which of the numbers between the products are not a row's own: (rows, sum of ranks)."""
        if ranks not in self.hidden:
            owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
            self.hidden[ranks] = owner != members
        return self.hidden[ranks]


def attach(followers: Sequence[tuple[Any, str, tuple[int, ...]]], combines: bool = False) -> StepAdapters:
    """Have all these layers, each with the name of its weight, add what the adapters of a step have for them."""
    step = StepAdapters(combines)
    for linear, buffer, index in followers:
        assert isinstance(linear, Linear)
        linear.adapters = step
        linear.slab = buffer, index
    return step
