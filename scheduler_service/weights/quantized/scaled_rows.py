"""Numbers of few bits with a scale for every group of columns: what most quantized formats hold."""

from dataclasses import dataclass

import torch

from quartet.kernels.cpu.native.quantized import UNIT, QuantizedRows, Scheme, quantize


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """Some rows of a matrix: value = scale * number + offset.

    Products and sums in float32 are exact for scales of 16 bits and whole zero points, so nothing is lost here.
    """

    numbers: torch.Tensor  # (rows, columns) uint8
    scales: torch.Tensor  # (rows, groups) float32
    offsets: torch.Tensor  # (rows, groups) float32
    group: int  # columns that share a scale, next to each other
    order: torch.Tensor | None = None  # (columns,) int64: the column of the matrix that each column here belongs to

    def values(self) -> torch.Tensor:
        """(rows, columns) float32, columns in the order of the matrix."""
        rows, columns = self.numbers.shape
        numbers = self.numbers.view(rows, columns // self.group, self.group).float()
        flat = numbers.mul_(self.scales.unsqueeze(2)).add_(self.offsets.unsqueeze(2)).view(rows, columns)
        return flat if self.order is None else torch.empty_like(flat).index_copy_(1, self.order, flat)

    def in_scheme(self, scheme: Scheme) -> QuantizedRows:
        """The same as rows of a quantized weight (`scheme_of`).

        Offsets are rounded to float16 when they are kept. Columns whose groups lie apart are quantized anew.
        """
        if self.order is not None:
            return quantize(self.values().bfloat16(), scheme)
        times = self.group // UNIT
        offsets = self.offsets.repeat_interleave(times, 1) if scheme.offsets else None
        return QuantizedRows(scheme, self.numbers, self.scales.repeat_interleave(times, 1), offsets)


def scheme_of(bits: int, columns: int, groups: int, zero_point: int | None = None) -> Scheme | None:
    """The scheme that holds the numbers of a matrix as they are; None where its groups do not fit the kernels'.

    `zero_point`: the number that means 0 in all groups, where there is one.
    """
    if columns % groups or columns // groups % UNIT:
        return None
    return Scheme(bits, UNIT, zero_point is None, zero_point or 0)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers in words of 32 bits, the lowest bits first: (…, n) int32 → (…, n * 32 / bits) uint8.

    Words are little-endian in files and in memory, so their bytes are in order already.
    """
    flat = words.contiguous().flatten()  # also where one word is all there is along the last axis, whatever its stride
    return unpacked_bytes(flat.view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1]), bits)


def unpacked_bytes(every_byte: torch.Tensor, bits: int) -> torch.Tensor:
    """The same of bytes: (…, n) uint8 → (…, n * 8 / bits) uint8."""
    if bits == 8:
        return every_byte
    steps = torch.arange(0, 8, bits, dtype=torch.uint8, device=every_byte.device)
    return (every_byte.unsqueeze(-1) >> steps & (1 << bits) - 1).flatten(-2)
