"""Weights in whole numbers of few bits: as rows (`Numbers`), and in the blocks that the kernels read (`GroupedWeight`).

A value is scale * (number - zero), or scale * number + offset. 32 numbers of a row, or 16, share a scale and an offset.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.structures import Grouped

UNIT = 32  # numbers of a row that lie together in a block
BITS = (4, 5, 6, 8)
AT_ONCE = 4 << 20  # numbers that are quantized or put into blocks between two yield points


@dataclass(frozen=True, slots=True)
class Form:
    """How the numbers of a weight are kept."""

    bits: int  # of BITS
    group: int  # numbers that share a scale: 16 or 32
    offsets: bool  # whether groups have offsets; else `zero` is what stands for 0
    zero: int = 0

    def joined(self, other: "Form") -> "Form":
        """The smallest form that holds the values of both, as they are."""
        if self == other:
            return self
        same_zero = self.zero == other.zero and not (self.offsets or other.offsets)
        bits, group = max(self.bits, other.bits), min(self.group, other.group)
        return Form(bits, group, not same_zero, self.zero if same_zero else 0)

    def nbytes(self, rows: int, columns: int) -> int:
        """What a weight of this shape takes."""
        numbers, scales = self.shapes(rows, columns)
        return torch.Size(numbers).numel() + 2 * torch.Size(scales).numel()

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the numbers (bytes) and of the scales (float16), in blocks."""
        blocks, units = -(-rows // native.BLOCK_COLUMNS), -(-columns // UNIT)
        kinds = UNIT // self.group, 1 + self.offsets
        return (blocks, units, 64 * self.bits), (blocks, units, *kinds, native.BLOCK_COLUMNS)


INT8 = Form(8, UNIT, offsets=False, zero=128)
INT4 = Form(4, UNIT, offsets=True)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Rows of a weight in whole numbers."""

    form: Form
    numbers: torch.Tensor  # (rows, columns) uint8, columns filled up to a multiple of UNIT
    scales: torch.Tensor  # (rows, columns / group) float32
    offsets: torch.Tensor | None  # as the scales

    def to(self, form: Form) -> "Numbers":
        """The same values in a form that holds them (Form.joined)."""
        scales, offsets = self.scales, self.offsets
        if form.offsets and offsets is None:
            offsets = scales * -float(self.form.zero)
        if (times := self.form.group // form.group) > 1:
            scales = scales.repeat_interleave(times, 1)
            offsets = None if offsets is None else offsets.repeat_interleave(times, 1)
        return Numbers(form, self.numbers, scales, offsets)

    def select(self, rows: torch.Tensor) -> "Numbers":
        """Some rows, in that order."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return Numbers(self.form, self.numbers[rows], self.scales[rows], offsets)

    def part(self, begin: int, end: int) -> "Numbers":
        offsets = None if self.offsets is None else self.offsets[begin:end]
        return Numbers(self.form, self.numbers[begin:end], self.scales[begin:end], offsets)

    def fits(self) -> bool:
        """Whether scales and offsets have a counterpart in float16."""
        return all(bool((part.abs() <= 65504).all()) for part in (self.scales, self.offsets) if part is not None)


class GroupedWeight:
    """A weight (rows, columns) in the blocks that products read. Its rows are undefined until they are written."""

    def __init__(self, rows: int, columns: int, form: Form) -> None:
        self.rows, self.columns, self.form = rows, columns, form
        self.allocate()

    def allocate(self) -> None:
        """Take memory, with undefined contents."""
        numbers, scales = self.form.shapes(self.rows, self.columns)
        self._keep(torch.empty(numbers, dtype=torch.uint8), torch.empty(scales, dtype=torch.float16))

    def _keep(self, numbers: torch.Tensor, scales: torch.Tensor) -> None:
        self.numbers, self.scales = numbers, scales
        self._arguments: dict[bool, Grouped] = {}  # made once: a product takes as long as making some of them

    def release(self) -> None:
        """Give the memory back; nothing may compute until `allocate`."""
        self._keep(self.numbers.new_empty(0), self.scales.new_empty(0))

    def exchange(self, other: "GroupedWeight") -> None:
        """Exchange the memory with a weight of the same shape and form."""
        assert (self.rows, self.columns, self.form) == (other.rows, other.columns, other.form)
        own = self.numbers, self.scales
        self._keep(other.numbers, other.scales)
        other._keep(*own)

    def copy_from(self, other: "GroupedWeight") -> None:
        """Copy the values of a weight of the same shape and form."""
        self.numbers.copy_(other.numbers)
        self.scales.copy_(other.scales)

    @property
    def nbytes(self) -> int:
        return self.form.nbytes(self.rows, self.columns)

    def argument(self, exact: bool) -> Grouped:
        """The weight as the kernels take it; `exact`: a row's bits must not depend on the other rows of a product."""
        if (known := self._arguments.get(exact)) is not None:
            return known
        form = self.form
        pointers = self.numbers.data_ptr(), self.scales.data_ptr()
        made = Grouped(*pointers, form.bits, UNIT // form.group, form.offsets, form.zero, exact)
        made.owner = self.numbers, self.scales
        self._arguments[exact] = made
        return made

    def write(self, first: int, part: Numbers, yield_point: Callable[[], None]) -> None:
        """Set rows from `first` on, which begins a block. What ends within a block is the end of a tensor."""
        assert first % native.BLOCK_COLUMNS == 0 and first + len(part.numbers) <= self.rows, (first, self.rows)
        assert part.form == self.form, (part.form, self.form)
        units = self.numbers.shape[1]
        assert part.numbers.shape[1] == units * UNIT, (part.numbers.shape, units)
        step = step_of(self.columns)
        for begin in range(0, len(part.numbers), step):
            some = part.part(begin, begin + step)
            block = (first + begin) // native.BLOCK_COLUMNS
            offsets = None if some.offsets is None else some.offsets.contiguous()
            scales = some.scales.contiguous()
            functions().quartet_group(
                some.numbers.contiguous().data_ptr(),
                scales.data_ptr(),
                None if offsets is None else offsets.data_ptr(),
                len(some.numbers),
                units,
                self.form.bits,
                UNIT // self.form.group,
                self.numbers[block].data_ptr(),
                self.scales[block].data_ptr(),
                torch.get_num_threads(),
            )
            yield_point()

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` (count,) int64 as bfloat16 (count, columns)."""
        assert ids.dtype is torch.int64 and ids.is_contiguous(), ids.dtype
        assert not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < self.rows), self.rows
        out = torch.empty(len(ids), self.columns, dtype=torch.bfloat16)
        argument = self.argument(exact=True)
        functions().quartet_grouped_rows(
            ctypes.byref(argument), self.columns, len(ids), ids.data_ptr(), out.data_ptr(), torch.get_num_threads()
        )
        return out

    def values(self, first: int, count: int) -> torch.Tensor:
        """Some rows that follow one another, as bfloat16."""
        return self.read(torch.arange(first, first + count))


def quantized(weight: torch.Tensor, form: Form) -> Numbers:
    """The numbers that come nearest to a weight (rows, columns) bfloat16.

    Without offsets the largest number of a group gets the largest whole number; with offsets several scales are tried,
    each improved by least squares, as ggml makes its K-quants.
    """
    native.check_matrix(weight)
    assert form.offsets or 1 < form.zero <= 1 << (form.bits - 1), form
    rows, columns = weight.shape
    width = -(-columns // UNIT) * UNIT
    numbers = torch.empty(rows, width, dtype=torch.uint8)
    scales = torch.empty(rows, width // form.group)
    offsets = torch.empty_like(scales) if form.offsets else None
    functions().quartet_quantize(
        weight.data_ptr(),
        rows,
        columns,
        weight.stride(0),
        form.bits,
        form.group,
        form.zero,
        numbers.data_ptr(),
        scales.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        torch.get_num_threads(),
    )
    return Numbers(form, numbers, scales, offsets)


def misfit(values: torch.Tensor, numbers: Numbers) -> str:
    """Why these numbers cannot stand for the values (rows, columns); empty where they can.

    Scales are float16. A group of very small values becomes zeros; that a matrix has some such groups changes nothing,
    but where most groups are so, they are all that it has.
    """
    if not numbers.fits():
        return "its values are too large"
    group, width = numbers.form.group, numbers.numbers.shape[1]
    padded = torch.nn.functional.pad(values, (0, width - values.shape[1]))
    there = padded.view(len(values), -1, group).ne(0).any(2)
    lost = there & (numbers.scales == 0)
    if numbers.offsets is not None:
        lost &= numbers.offsets == 0
    return "its values are too small" if 2 * int(lost.sum()) > int(there.sum()) else ""


def rounded(weight: torch.Tensor, form: Form) -> torch.Tensor:
    """The values of a weight (rows, columns) bfloat16 after it was quantized."""
    grouped = GroupedWeight(weight.shape[0], weight.shape[1], form)
    grouped.write(0, quantized(weight, form), lambda: None)
    return grouped.values(0, len(weight))


def step_of(columns: int) -> int:
    """Rows, whole blocks of them, that are dealt with between two yield points."""
    return max(1, AT_ONCE // max(1, columns * native.BLOCK_COLUMNS)) * native.BLOCK_COLUMNS


def functions() -> ctypes.CDLL:
    """The C functions of grouped.c, with their arguments declared."""
    loaded = native.functions()
    pointer, size, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    if loaded.quartet_group.argtypes is None:
        loaded.quartet_group.argtypes = (*[pointer] * 3, size, size, small, small, pointer, pointer, small)
        loaded.quartet_quantize.argtypes = (pointer, *[size] * 3, *[small] * 3, *[pointer] * 3, small)
        loaded.quartet_grouped_rows.argtypes = (pointer, size, size, pointer, pointer, small)
        for function in (loaded.quartet_group, loaded.quartet_quantize, loaded.quartet_grouped_rows):
            function.restype = None
    return loaded
