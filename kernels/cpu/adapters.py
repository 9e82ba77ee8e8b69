"""What LoRA adapters add to the products of a step: b @ (a @ x) for the rows that have an adapter.

Our own kernels of bfloat16 add it to the sums of a product (native/adapters.h), also where all layers are one call; for
products of float32, which are torch's, there is a kernel that adds it afterwards. Elsewhere torch adds it, adapter by
adapter. A row's bits never depend on the adapters of other rows.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from quartet.kernels.cpu.linear import Linear, no_pause
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native import structures
from quartet.kernels.cpu.native.library import BLOCK_COLUMNS, BLOCK_DEPTH, Library, padded

Slab = tuple[str, tuple[int, ...]]  # names one weight
Factors = tuple[int, torch.Tensor, torch.Tensor]  # first column, a (rank, in), b (columns, rank)

PAIRS = {torch.bfloat16: 2, torch.float32: 1}  # neighbours in k that lie together in a packed factor
LINES_BEHIND = 16  # of zeros, which tiles read at the end of a packed factor


@dataclass(frozen=True, slots=True)
class PlainAddition:
    """What one adapter adds to neighbouring columns of a product: all that it has for a weight, in two products."""

    first: int  # column
    width: int
    shrink: Linear  # (ranks, in)
    expand: Linear  # (width, ranks)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """y (rows, out) += expand(shrink(x)), in the columns that this changes; x (rows, in)."""
        y[:, self.first : self.first + self.width] += self.expand(self.shrink(x))


@dataclass(frozen=True, slots=True)
class PackedAddition:
    """The same as our own kernels take it."""

    structure: structures.Addition
    memory: tuple[object, ...]  # that it points to


Addition = PlainAddition | PackedAddition


def plain_addition(
    factors: Sequence[Factors], keep_order: bool = False, yield_point: Callable[[], None] = no_pause
) -> PlainAddition:
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
    return PlainAddition(first, width, *linears)


def packed_addition(factors: Sequence[Factors], yield_point: Callable[[], None] = no_pause) -> PackedAddition:
    """The factors that an adapter has for parts of one weight, bfloat16 or float32, as our own kernels take them."""
    pair, place = PAIRS[factors[0][1].dtype], 0
    depth = BLOCK_DEPTH if pair == 2 else 1
    parts, places = (structures.Part * len(factors))(), list[int]()
    packed = [packed_factor(torch.cat([a for _, a, _ in factors]), 0, depth)]
    for part, (start, a, b) in zip(parts, factors, strict=True):
        yield_point()
        packed.append(packed_factor(b, start % BLOCK_COLUMNS, pair))
        first, rank = start // BLOCK_COLUMNS, padded(len(a), pair)
        blocks = padded(start + len(b), BLOCK_COLUMNS) // BLOCK_COLUMNS - first
        part.first, part.blocks, part.rank, part.place, part.b = first, blocks, rank, place, packed[-1].data_ptr()
        places += range(place, place + len(a))
        place += padded(rank, BLOCK_DEPTH)
    ranks = padded(len(places), BLOCK_COLUMNS)
    numbers = torch.tensor(places + [-1] * (ranks - len(places)), dtype=torch.int32)
    structure = structures.Addition(packed[0].data_ptr(), ranks, place, numbers.data_ptr(), parts, len(parts))
    return PackedAddition(structure, (*packed, numbers, parts))


def packed_factor(matrix: torch.Tensor, before: int, depth: int) -> torch.Tensor:
    """matrix (n, k) → flat (blocks of 16 rows, k / pair, 16, pair) and LINES_BEHIND lines, k padded to `depth`.

    `before`: so many rows of zeros stand in front of it.
    """
    pair, (n, k) = PAIRS[matrix.dtype], matrix.shape
    rows, columns = padded(before + n, BLOCK_COLUMNS), padded(k, depth)
    room = matrix.new_zeros(rows, columns)
    room[before : before + n, :k] = matrix
    numbers = room.view(torch.int32)  # pairs, or single floats
    blocks = numbers.view(rows // BLOCK_COLUMNS, BLOCK_COLUMNS, columns // pair).transpose(1, 2)
    out = numbers.new_zeros(numbers.numel() + LINES_BEHIND * BLOCK_COLUMNS)
    out[: numbers.numel()].view(blocks.shape).copy_(blocks)
    return out.view(matrix.dtype)


class AdapterWeights:
    """What one adapter has for the weights of a model."""

    def __init__(self, additions: Mapping[int, Addition], products: int) -> None:
        """`additions` by the number of a product, of which there are so many."""
        self.additions = additions
        self.table = (structures.Addition * products)()  # those that are packed; the others have no factors
        for number, addition in additions.items():
            if isinstance(addition, PackedAddition):
                self.table[number] = addition.structure


class StepAdapters:
    """The adapters of the step that is computed; none between steps."""

    def __init__(self, linears: Sequence[tuple[Linear, Slab]], keeps_order: bool = False) -> None:
        """`linears`: with the names of their weights; from now on these add what the adapters of a step have for them.

        `keeps_order`: a row's bits must not depend on its company, whoever computes.
        """
        self.numbers: dict[Slab, int] = {}  # of products
        self.keeps_order = keeps_order
        self.kernels = kernels_for(linears[0][0])
        self.adapters: Sequence[AdapterWeights] = ()
        self.owners: torch.Tensor | None = None  # (rows,) int32: index of a row's adapter, or -1
        self.selected: torch.Tensor | None = None  # the same of the rows of the product at hand
        self.additions: structures.Additions | None = None  # likewise; None: no adapters
        for linear, slab in linears:
            linear.adapters, linear.number = self, self.numbers.setdefault(slab, len(self.numbers))

    def weights(
        self, slabs: Mapping[Slab, Sequence[Factors]], yield_point: Callable[[], None] = no_pause
    ) -> AdapterWeights:
        """An adapter as steps take it; safe in another thread. `yield_point` is called after each piece of work."""
        additions: dict[int, Addition] = {}
        for slab, factors in slabs.items():
            if self.kernels is not None:
                additions[self.numbers[slab]] = packed_addition(factors, yield_point)
            else:
                additions[self.numbers[slab]] = plain_addition(factors, self.keeps_order, yield_point)
            yield_point()
        return AdapterWeights(additions, len(self.numbers))

    @contextmanager
    def of_step(self, adapters: Sequence[AdapterWeights], owners: torch.Tensor) -> Iterator[None]:
        """Within it products add what these adapters have for their rows; `owners` (rows,): index of each, or -1."""
        assert bool((owners < len(adapters)).all()), owners
        self.adapters, self.owners = adapters, owners.int()
        self.select(None)
        try:
            yield
        finally:
            self.adapters, self.owners, self.selected, self.additions = (), None, None, None

    def select(self, rows: torch.Tensor | None) -> None:
        """The next products are of these rows of the step only, in this order; None: of all."""
        if self.owners is None:
            return
        self.selected = self.owners if rows is None else self.owners[rows]
        self.additions = additions(self.adapters, self.selected) if self.kernels is not None else None

    def add(self, linear: Linear, x: torch.Tensor, y: torch.Tensor) -> None:
        """y (rows, out) += what the rows' adapters have for a layer's weight; x (rows, in)."""
        if self.selected is None:
            return
        if self.additions is not None:
            assert self.kernels is not None and x.dtype is torch.float32, x.dtype
            add_float(self.kernels, x, y, self.additions, linear.number)
            return
        for index, weights in enumerate(self.adapters):
            addition = weights.additions.get(linear.number)
            rows = (self.selected == index).nonzero().flatten()
            if addition is not None and len(rows):
                assert isinstance(addition, PlainAddition), addition
                own = y[rows]
                addition.add(x[rows], own)
                y[rows] = own


def kernels_for(linear: Linear) -> Library | None:
    """The kernels that add what adapters have to the products of a model, of which this is one."""
    if linear.quantized is None and linear.weight.device.type != "cpu":  # quantized weights are on CPUs
        return None
    dtype, kernels = linear.weight.dtype, native.library()
    return kernels if dtype is torch.float32 or (dtype is torch.bfloat16 and linear.has_kernel) else None


def additions(adapters: Sequence[AdapterWeights], owners: torch.Tensor) -> structures.Additions:
    """The adapters of some rows as the kernels take them; owners (rows,) int32."""
    tables = (ctypes.c_void_p * len(adapters))(*(ctypes.addressof(weights.table) for weights in adapters))
    made = structures.Additions(tables, len(adapters), owners.data_ptr())
    made.rows, made.owner = len(owners), (adapters, owners)
    return made


def add_float(
    kernels: Library, x: torch.Tensor, out: torch.Tensor, additions: structures.Additions, number: int
) -> None:
    """out (rows, n) += what the rows' adapters have for product `number`; x (rows, k), both float32.

    The factors that they have must be of this shape.
    """
    (rows, k), (out_rows, n) = x.shape, out.shape
    assert rows == out_rows, (rows, out_rows)
    for tensor in (x, out):
        assert tensor.dtype is torch.float32 and tensor.device.type == "cpu", (tensor.dtype, tensor.device)
        assert tensor.stride(1) == 1 or tensor.shape[1] == 1, tensor.stride()
    add = kernels.functions.quartet_add_float
    add.argtypes = (ctypes.c_void_p, ctypes.POINTER(structures.Adding))
    wanted = structures.Adding(
        x.data_ptr(),
        rows,
        k,
        x.stride(0),
        out.data_ptr(),
        n,
        out.stride(0),
        number,
        native.pointer_to(additions, rows),
        torch.get_num_threads(),
    )
    if add(kernels.kernels, wanted):
        raise MemoryError(f"no memory for the adapters of {rows} rows")


def attach(followers: Sequence[tuple[Any, str, tuple[int, ...]]], keeps_order: bool = False) -> StepAdapters:
    """Have all these layers, each with the name of its weight, add what the adapters of a step have for them."""
    linears = [(layer, (buffer, index)) for layer, buffer, index in followers if isinstance(layer, Linear)]
    assert len(linears) == len(followers), "each is a linear layer"
    return StepAdapters(linears, keeps_order)
