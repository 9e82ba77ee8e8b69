"""Quantized weights: as rows (`QuantizedRows`), and in the blocks that the kernels read (`QuantizedWeight`).

A value is scale * (number - zero point), or scale * number + offset, with integers of few bits. 32 numbers of a row, or
16, form a group: they share a scale and an offset. Both are float16, or both are bytes. Then a scale is the least one
of its row, a power of two, times (1 + m / 16) * 2**e with m and e from 0 to 15, and an offset is -scale * b / 16 with b
from 0 to 255.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from quartet.kernels.cpu import addresses
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.pages import in_huge_pages
from quartet.kernels.cpu.native.structures import Quantized

UNIT = 32  # numbers of a row that lie together in a block
BITS = (4, 5, 6, 8)
GROUP_SIZES = (16, 32)
ROTATED_GROUPS = (128, 256)
ROTATED_COLUMNS = 128  # are rotated together: a rotated weight has a multiple of them
RowSource = Callable[[torch.Tensor], torch.Tensor]  # numbers of rows (count,) → (count, columns) bfloat16
AT_ONCE = 4 << 20  # numbers that are quantized or put into blocks between two yield points


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is quantized."""

    bits: int  # of BITS
    group_size: int  # numbers that share a scale, of GROUP_SIZES
    offsets: bool  # whether groups have offsets; else `zero_point` means 0
    zero_point: int = 0
    rotated: int = 0  # rows are rotated, and so many numbers (of ROTATED_GROUPS) have the same scale; 0: they are not
    row_bits: int = 8  # of the integers that rows become in a product; 16: with schemes that are else INT8
    scale_bits: int = 16  # of scales and offsets: 16 or 8

    def joined(self, other: "Scheme") -> "Scheme":
        """The smallest scheme that holds the values of both, as they are, with scales of 16 bits and no rotation.

        It has scales of 8 bits, or is rotated, only if they are equal.
        """
        if self == other:
            return self
        same_zero_point = self.zero_point == other.zero_point and not (self.offsets or other.offsets)
        bits, group = max(self.bits, other.bits), min(self.group_size, other.group_size)
        made = Scheme(bits, group, not same_zero_point, self.zero_point if same_zero_point else 0)
        return LONG_ROWS_INT8 if made == INT8 and LONG_ROWS_INT8 in (self, other) else made

    def nbytes(self, rows: int, columns: int) -> int:
        """What a weight of this shape takes."""
        numbers, scales = self.shapes(rows, columns)
        return torch.Size(numbers).numel() + torch.Size(scales).numel()

    def groups(self, columns: int) -> int:
        """How many groups of numbers with the same scale a row has."""
        units = -(-columns // UNIT)
        if not self.rotated:
            return units * (UNIT // self.group_size)
        return -(-columns // min(self.rotated, columns))

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the numbers and of the scales in blocks, both bytes."""
        blocks, units = -(-rows // native.BLOCK_COLUMNS), -(-columns // UNIT)
        scales = self.groups(columns) * (1 + self.offsets) * self.scale_bits // 8
        least = 2 if self.scale_bits == 8 else 0  # one of each row, in bfloat16
        return (blocks, units, 64 * self.bits), (blocks, (scales + least) * native.BLOCK_COLUMNS)


INT8 = Scheme(8, UNIT, offsets=False, zero_point=128)
LONG_ROWS_INT8 = replace(INT8, row_bits=16)
ROTATED_INT8 = replace(INT8, rotated=256)
FINE_ROTATED_INT8 = replace(INT8, rotated=128)
INT4 = Scheme(4, UNIT, offsets=True, scale_bits=8)
INT6 = Scheme(6, UNIT, offsets=False, zero_point=32, scale_bits=8)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of a quantized weight."""

    scheme: Scheme
    numbers: torch.Tensor  # (rows, columns) uint8, columns filled up to a multiple of UNIT
    scales: torch.Tensor  # (rows, groups) float32
    offsets: torch.Tensor | None  # as the scales
    least: torch.Tensor | None = None  # (rows,) float32, the least scale that a row may have, where scales have 8 bits

    def to(self, scheme: Scheme) -> "QuantizedRows":
        """The same values in a scheme that holds them (Scheme.joined)."""
        scales, offsets = self.scales, self.offsets
        if scheme.offsets and offsets is None:
            offsets = scales * -float(self.scheme.zero_point)
        if (times := self.scheme.group_size // scheme.group_size) > 1:
            scales = scales.repeat_interleave(times, 1)
            offsets = None if offsets is None else offsets.repeat_interleave(times, 1)
        return QuantizedRows(scheme, self.numbers, scales, offsets)

    def select(self, rows: torch.Tensor) -> "QuantizedRows":
        """Some rows, in that order."""
        return self._of(lambda tensor: tensor[rows])

    def part(self, begin: int, end: int) -> "QuantizedRows":
        return self._of(lambda tensor: tensor[begin:end])

    def _of(self, chosen: Callable[[torch.Tensor], torch.Tensor]) -> "QuantizedRows":
        offsets, least = (None if tensor is None else chosen(tensor) for tensor in (self.offsets, self.least))
        return QuantizedRows(self.scheme, chosen(self.numbers), chosen(self.scales), offsets, least)

    def columns(self, first: int, length: int) -> "QuantizedRows":
        """Some columns, whole groups of them, filled up to a multiple of UNIT with zeros."""
        size, filled = self.scheme.group_size, -length % UNIT
        assert first % size == length % size == 0, (first, length, size)

        def of_groups(part: torch.Tensor) -> torch.Tensor:
            return F.pad(part[:, first // size : (first + length) // size], (0, filled // size))

        numbers = F.pad(self.numbers[:, first : first + length], (0, filled))
        offsets = None if self.offsets is None else of_groups(self.offsets)
        return QuantizedRows(self.scheme, numbers, of_groups(self.scales), offsets, self.least)

    @staticmethod
    def below(parts: "list[QuantizedRows]") -> "QuantizedRows":
        """Rows of one scheme, those of each part below the ones before."""
        if len(parts) == 1:
            return parts[0]
        offsets, least = (
            torch.cat(tensors) if (tensors := [tensor for tensor in found if tensor is not None]) else None
            for found in ([part.offsets for part in parts], [part.least for part in parts])
        )
        numbers, scales = torch.cat([part.numbers for part in parts]), torch.cat([part.scales for part in parts])
        return QuantizedRows(parts[0].scheme, numbers, scales, offsets, least)

    def fits(self) -> bool:
        """Whether scales and offsets are no larger than float16 can be, also where they are bytes."""
        return all(bool((part.abs() <= 65504).all()) for part in (self.scales, self.offsets) if part is not None)


class QuantizedWeight:
    """A weight (rows, columns) in the blocks that products read. Its rows are undefined until they are written."""

    def __init__(self, rows: int, columns: int, scheme: Scheme) -> None:
        assert scheme.row_bits == 8 or scheme == LONG_ROWS_INT8, scheme
        assert scheme.rotated in (0, *ROTATED_GROUPS), scheme
        bytes_fit = scheme.group_size == UNIT and not scheme.rotated and scheme.row_bits == 8
        assert scheme.scale_bits == 16 or (bytes_fit and (scheme.bits == 4 or not scheme.offsets)), scheme
        self.rows, self.columns, self.scheme = rows, columns, scheme
        self._take_memory()

    def allocate(self) -> None:
        """Take memory again, with undefined contents."""
        self._take_memory()
        addresses.moved()

    def _take_memory(self) -> None:
        numbers, scales = self.scheme.shapes(self.rows, self.columns)
        memory = in_huge_pages(torch.empty(self.scheme.nbytes(self.rows, self.columns), dtype=torch.uint8))
        size = torch.Size(numbers).numel()
        self._keep(memory[:size].view(numbers), memory[size:].view(scales))

    def _keep(self, numbers: torch.Tensor, scales: torch.Tensor, source: RowSource | None = None) -> None:
        self.numbers, self.scales, self.source = numbers, scales, source
        self._arguments: dict[bool, Quantized] = {}  # made once: a product takes as long as making some of them

    def release(self) -> None:
        """Give the memory back; nothing may compute until `allocate`."""
        self.keep_elsewhere(None)

    def keep_elsewhere(self, source: RowSource | None) -> None:
        """Take no memory, and have rows read by `source` until some are written. No product may read such a weight."""
        self._keep(self.numbers.new_empty(0), self.scales.new_empty(0), source)
        addresses.moved()

    def exchange(self, other: "QuantizedWeight") -> None:
        """Exchange the memory with a weight of the same shape and scheme."""
        assert (self.rows, self.columns, self.scheme) == (other.rows, other.columns, other.scheme)
        own = self.numbers, self.scales, self.source
        self._keep(other.numbers, other.scales, other.source)
        other._keep(*own)
        addresses.moved()

    def copy_from(self, other: "QuantizedWeight") -> None:
        """Copy the values of a weight of the same shape and scheme."""
        if other.source is not None:
            self.keep_elsewhere(other.source)
            return
        if self.source is not None:
            self.allocate()
        self.numbers.copy_(other.numbers)
        self.scales.copy_(other.scales)

    @property
    def nbytes(self) -> int:
        return 0 if self.source is not None else self.scheme.nbytes(self.rows, self.columns)

    def argument(self, exact: bool) -> Quantized:
        """The weight as the kernels take it; `exact`: a row's bits must not depend on the other rows of a product."""
        assert self.source is None, "its rows are not in memory"
        if (known := self._arguments.get(exact)) is not None:
            return known
        scheme = self.scheme
        pointers = self.numbers.data_ptr(), self.scales.data_ptr()
        halves = UNIT // scheme.group_size
        made = Quantized(*pointers, scheme.bits, halves, scheme.offsets, scheme.zero_point, scheme.scale_bits)
        made.rotated, made.row_bits, made.exact = scheme.rotated, scheme.row_bits, exact
        made.owner = self.numbers, self.scales
        self._arguments[exact] = made
        return made

    def write(self, first: int, part: QuantizedRows, yield_point: Callable[[], None]) -> None:
        """Set rows from `first` on, which begins a block. What ends within a block is the end of a tensor."""
        assert first % native.BLOCK_COLUMNS == 0 and first + len(part.numbers) <= self.rows, (first, self.rows)
        assert part.scheme == self.scheme, (part.scheme, self.scheme)
        if self.source is not None:
            self.allocate()
        units = self.numbers.shape[1]
        assert part.numbers.shape[1] == units * UNIT, (part.numbers.shape, units)
        step = step_of(self.columns)
        for begin in range(0, len(part.numbers), step):
            some = part.part(begin, begin + step)._of(torch.Tensor.contiguous)
            block, groups = (first + begin) // native.BLOCK_COLUMNS, some.scales.shape[1]
            assert groups == self.scheme.groups(self.columns), (some.scales.shape, self.scheme)
            optional = (None if tensor is None else tensor.data_ptr() for tensor in (some.offsets, some.least))
            there = self.argument(exact=True)
            to = Quantized.from_buffer_copy(there)
            to.numbers, to.scales = self.numbers[block].data_ptr(), self.scales[block].data_ptr()
            pointers = some.numbers.data_ptr(), some.scales.data_ptr(), *optional
            shape = len(some.numbers), units, groups
            functions().quartet_pack_quantized(*pointers, *shape, ctypes.byref(to), torch.get_num_threads())
            yield_point()

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` (count,) int64 as bfloat16 (count, columns)."""
        assert ids.dtype is torch.int64 and ids.is_contiguous(), ids.dtype
        outside = f"rows below 0 or not below {self.rows}"
        if self.source is not None:
            assert not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < self.rows), outside
            return self.source(ids)
        out = torch.empty(len(ids), self.columns, dtype=torch.bfloat16)
        argument = self.argument(exact=True)
        shape, pointers = (self.rows, self.columns, len(ids)), (ids.data_ptr(), out.data_ptr())
        read = functions().quartet_quantized_rows
        failed = read(ctypes.byref(argument), *shape, *pointers, torch.get_num_threads())
        assert not failed, outside
        return out

    def values(self, first: int, count: int) -> torch.Tensor:
        """Some rows that follow one another, as bfloat16."""
        return self.read(torch.arange(first, first + count))


def quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedRows:
    """The numbers that come nearest to a weight (rows, columns) bfloat16.

    With 8 bits and no offsets the largest value of a group gets the largest integer; else several scales are tried,
    each improved by least squares, as ggml makes its K-quants. Rows of a rotated scheme are rotated before.
    """
    native.check_matrix(weight)
    assert scheme.offsets or 1 < scheme.zero_point <= 1 << (scheme.bits - 1), scheme
    rows, columns = weight.shape
    assert not scheme.rotated or (scheme.rotated in ROTATED_GROUPS and columns % ROTATED_COLUMNS == 0), columns
    width = -(-columns // UNIT) * UNIT
    numbers = torch.empty(rows, width, dtype=torch.uint8)
    scales = torch.empty(rows, scheme.groups(columns))
    offsets = torch.empty_like(scales) if scheme.offsets else None
    least = torch.empty(rows) if scheme.scale_bits == 8 else None
    functions().quartet_quantize(
        weight.data_ptr(),
        rows,
        columns,
        weight.stride(0),
        scheme.bits,
        scheme.group_size,
        scheme.zero_point,
        scheme.rotated,
        numbers.data_ptr(),
        scales.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        None if least is None else least.data_ptr(),
        torch.get_num_threads(),
    )
    return QuantizedRows(scheme, numbers, scales, offsets, least)


def misfit(values: torch.Tensor, numbers: QuantizedRows) -> str:
    """Why these numbers cannot stand for the values (rows, columns); empty where they can.

    Scales are float16. A group of very small values becomes zeros; that a matrix has some such groups changes nothing,
    but where most groups are so, they are all that it has.
    """
    if not numbers.fits():
        return "its values are too large"
    scheme = numbers.scheme
    group = scheme.group_size if not scheme.rotated else min(scheme.rotated, values.shape[1])

    def in_groups(tensor: torch.Tensor) -> torch.Tensor:
        return F.pad(tensor, (0, numbers.scales.shape[1] * group - tensor.shape[1])).view(len(values), -1, group)

    there = in_groups(values).ne(0).any(2)
    lost = there & (numbers.scales == 0)
    if numbers.least is not None:  # no scale is 0, but all values may be
        zeros = in_groups(numbers.numbers) == (0 if scheme.offsets else scheme.zero_point)
        lost = there & zeros.all(2)
    if numbers.offsets is not None:
        lost &= numbers.offsets == 0
    return "its values are too small" if 2 * int(lost.sum()) > int(there.sum()) else ""


def rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The values of a weight (rows, columns) bfloat16 after it was quantized."""
    quantized = QuantizedWeight(weight.shape[0], weight.shape[1], scheme)
    quantized.write(0, quantize(weight, scheme), lambda: None)
    return quantized.values(0, len(weight))


def step_of(columns: int) -> int:
    """Rows, whole blocks of them, that are dealt with between two yield points."""
    return max(1, AT_ONCE // max(1, columns * native.BLOCK_COLUMNS)) * native.BLOCK_COLUMNS


def functions() -> ctypes.CDLL:
    """The C functions of quantized.c, with their arguments declared. Every library has them."""
    found = native.library()
    loaded = native.functions(native.INSTRUCTION_SETS[0]) if found is None else found.functions
    pointer, size, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    if loaded.quartet_pack_quantized.argtypes is None:
        loaded.quartet_pack_quantized.argtypes = (*[pointer] * 4, *[size] * 3, pointer, small)
        loaded.quartet_quantize.argtypes = (pointer, *[size] * 3, *[small] * 4, *[pointer] * 4, small)
        loaded.quartet_quantized_rows.argtypes = (pointer, *[size] * 3, pointer, pointer, small)
        loaded.quartet_pack_quantized.restype = loaded.quartet_quantize.restype = None
    return loaded
