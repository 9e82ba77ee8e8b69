"""From the stored parts of some rows to their numbers, one pure function for each layout of quantized matrices.

Parts hold the rows that are wanted and are given by name, without the prefix of the tensor. Errors are ValueError; who
knows the tensor's name adds it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from quartet.kernels.cpu.native.quantized import UNIT, Scheme
from quartet.scheduler_service.weights.quantized.scaled_rows import ScaledRows, unpacked, unpacked_bytes

Parts = Mapping[str, torch.Tensor]

MXFP4 = Scheme(5, UNIT, offsets=False, zero_point=16)  # in halves: the numbers of MXFP4 without rounding
MXFP4_GROUP = 32  # columns that share an exponent
MXFP4_BYTES = MXFP4_GROUP // 2
MXFP4_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)  # what three bits mean; the fourth is the sign
MXFP4_BIAS = 127  # of the exponents
MXFP4_NAN = 255

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the numbers of eight neighbouring rows are


def gptq(parts: Parts, bits: int, added: int) -> ScaledRows:
    """qweight (columns * bits / 32, rows), qzeros (groups, rows * bits / 32), scales (groups, rows), g_idx (columns,).

    `added` is 1 where the file holds zero points minus one, as all but gptq_v2 do.
    """
    numbers = unpacked(parts["qweight"].T, bits)  # (rows, columns)
    zeros = (unpacked(parts["qzeros"], bits) + added & (1 << bits) - 1).T
    scales = parts["scales"].T.float()
    columns, groups = numbers.shape[1], scales.shape[1]
    group, order = columns // groups, None
    if "g_idx" in parts:
        order = column_order(parts["g_idx"], groups, group)
        numbers = numbers if order is None else numbers[:, order]
    return ScaledRows(numbers.contiguous(), scales, -scales * zeros.float(), group, order=order)


def column_order(group_of: torch.Tensor, groups: int, group: int) -> torch.Tensor | None:
    """The columns sorted by group; None where they are in order. Raises ValueError for groups that are not equal."""
    if (group_of < 0).all():
        return None  # written, but never set
    if group_of.min() < 0 or group_of.max() >= groups:
        raise ValueError(f"a column belongs to a group that is not one of the {groups}")
    group_of = group_of.long()
    if not (torch.bincount(group_of, minlength=groups) == group).all():
        raise ValueError(f"its groups do not have {group} columns each")
    order = torch.argsort(group_of, stable=True)
    return None if torch.equal(order, torch.arange(len(order), device=order.device)) else order


def awq(parts: Parts) -> ScaledRows:
    """qweight (columns, rows / 8), qzeros (groups, rows / 8), scales (groups, rows); 4 bits in the order of gemm."""
    numbers, zeros = (awq_numbers(parts[name]) for name in ("qweight", "qzeros"))
    scales = parts["scales"].T.float()
    return ScaledRows(numbers, scales, -scales * zeros.float(), numbers.shape[1] // scales.shape[1])


def awq_numbers(words: torch.Tensor) -> torch.Tensor:
    """(n, rows / 8) int32 → (rows, n) uint8"""
    order = torch.tensor(AWQ_ORDER, device=words.device)
    words_first: torch.Tensor = unpacked(words, 4).unflatten(1, (-1, 8))
    return words_first[:, :, order].flatten(1).T.contiguous()


def packed_words(parts: Parts, bits: int, columns: int) -> ScaledRows:
    """weight_packed (rows, columns * bits / 32), weight_scale (rows, groups) or one number.

    Of `columns` columns, or of whole groups of them.
    There may be weight_zero_point (rows * bits / 32, groups), and weight_g_idx (columns,) where the columns of a group
    are not side by side. Numbers are stored without a sign: where there are no zero points, the middle one means 0.
    """
    numbers = unpacked(parts["weight_packed"], bits)[:, :columns]
    rows, columns = numbers.shape
    scales = row_scales(parts["weight_scale"], rows)
    groups, order = scales.shape[1], None
    if "weight_zero_point" in parts:
        zeros = unpacked(parts["weight_zero_point"].T, bits).T[:rows].float()
    else:
        zeros = torch.full((1, 1), float(1 << bits - 1), device=scales.device)
    if "weight_g_idx" in parts:
        order = column_order(parts["weight_g_idx"], groups, columns // groups)
        numbers = numbers if order is None else numbers[:, order]
    return ScaledRows(numbers.contiguous(), scales, -scales * zeros, columns // groups, order=order)


def int8(parts: Parts) -> ScaledRows:
    """weight (rows, columns) int8, weight_scale and weight_zero_point: one number, one a row, or some a row."""
    numbers = parts["weight"].view(torch.uint8) ^ 0x80
    scales = row_scales(parts["weight_scale"], len(numbers))
    zeros = row_scales(parts["weight_zero_point"], len(numbers)) if "weight_zero_point" in parts else 0
    return ScaledRows(numbers, scales, -scales * (128 + zeros), numbers.shape[1] // scales.shape[1])


def mxfp4(parts: Parts, first: int = 0, step: int = 1) -> ScaledRows:
    """blocks (rows, groups, 16) uint8, the first of two numbers in the low bits; scales (rows, groups): exponents.

    Of the rows only every `step`th from `first` on.
    """
    exponents = parts["scales"][first::step]
    halves = torch.tensor(MXFP4_HALVES, dtype=torch.uint8, device=exponents.device)
    numbers = torch.cat((MXFP4.zero_point + halves, MXFP4.zero_point - halves))
    codes = unpacked_bytes(parts["blocks"][first::step].flatten(1), 4)  # (rows, columns)
    scales = torch.ldexp(torch.full_like(exponents, 0.5, dtype=torch.float32), exponents.int() - MXFP4_BIAS)
    scales = scales.masked_fill(exponents == MXFP4_NAN, torch.nan)
    return ScaledRows(numbers[codes.long()], scales, scales * -float(MXFP4.zero_point), MXFP4_GROUP)


def int4_with_signs(parts: Parts) -> ScaledRows:
    """_weight_qdata (rows, columns / 2) int8: two numbers with signs, the first in the low bits.

    _weight_scale, _weight_zero_point (groups, rows): value = scale * number + zero.
    """
    numbers = unpacked_bytes(parts["_weight_qdata"].view(torch.uint8), 4) ^ 8
    scales, zeros = (parts[f"_weight_{name}"].T.float().contiguous() for name in ("scale", "zero_point"))
    return ScaledRows(numbers, scales, zeros - 8 * scales, numbers.shape[1] // scales.shape[1])


def int4_tiles(parts: Parts, columns: int) -> ScaledRows:
    """_weight_qdata (rows / 8, k / 32 / n, 32, n) int32 as the tensor cores of tinygemm read it; k is filled up.

    _weight_scale_and_zero (groups, rows, 2): value = scale * (number - 8) + zero. Of the 32 words of a tile, four
    belong to each of eight rows. Word j of four has of 32 columns 2 j and those 8, 16 and 24 behind it, then the
    columns next to these (`_convert_weight_to_int4pack` of PyTorch for CUDA).
    """
    words = parts["_weight_qdata"]
    tiles, steps, _, runs = words.shape
    numbers = unpacked(words, 4).view(tiles, steps, 8, 4, runs, 2, 4).permute(0, 2, 1, 4, 6, 3, 5)
    numbers = numbers.reshape(tiles * 8, -1)
    scales, zeros = parts["_weight_scale_and_zero"].transpose(0, 1).float().unbind(2)  # (rows, groups)
    group = numbers.shape[1] // scales.shape[1]
    scales, zeros = (part[:, : columns // group].contiguous() for part in (scales, zeros))
    return ScaledRows(numbers[: len(scales), :columns].contiguous(), scales, zeros - 8 * scales, group)


class Table(NamedTuple):
    """How the scales of a matrix in 4 bits are found."""

    block: int  # values that share a scale
    nested_block: int | None  # scales that share one, where the scales are places in a table
    nested_offset: float


def bitsandbytes(parts: Parts, first: int, table: Table) -> torch.Tensor:
    """weight (values / 2, 1) uint8, the first of two values in the high bits → (values,) float32.

    weight.quant_map (16,), weight.absmax (blocks,) of the whole matrix, of which the first value wanted is number
    `first`; weight.nested_quant_map (256,) and weight.nested_absmax where absmax is in 8 bits.
    """
    packed = parts["weight"].flatten()
    numbers = torch.stack((packed >> 4, packed & 15), 1).flatten()
    last = -(-(first + len(numbers)) // table.block)
    begin = first // table.block
    scales = parts["weight.absmax"][begin:last]
    if table.nested_block is not None:
        own = torch.arange(begin, last, device=scales.device) // table.nested_block
        scales = parts["weight.nested_quant_map"][scales.long()] * parts["weight.nested_absmax"][own]
        scales = scales + table.nested_offset
    of_each = scales.repeat_interleave(table.block)[first - begin * table.block :][: len(numbers)]
    values: torch.Tensor = parts["weight.quant_map"][numbers.long()] * of_each
    return values


def float8(parts: Parts, scale: str) -> torch.Tensor:
    """weight (rows, columns) in 8 bits, and one scale for all, for each row, or for groups of columns. float32"""
    weight = parts["weight"].float()
    scales = row_scales(parts[scale], len(weight))
    groups: torch.Tensor = weight.unflatten(1, (scales.shape[1], -1))
    return groups.mul_(scales.unsqueeze(2)).flatten(1)


def float8_blocks(parts: Parts, scale: str, block: tuple[int, int], first: int) -> torch.Tensor:
    """The same with a scale for every block of rows and columns; the last blocks may be cut off. float32

    The first row that is wanted lies `first` rows behind the beginning of its block.
    """
    weight = parts["weight"].float()
    rows, columns = weight.shape
    scales = parts[scale].float()
    row = (torch.arange(rows, device=weight.device) + first) // block[0]
    column = torch.arange(columns, device=weight.device) // block[1]
    return weight.mul_(scales.index_select(0, row).index_select(1, column))


def row_scales(scales: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, groups) float32 from one number, one a row, or some a row."""
    found = scales.float()
    return found.expand(rows, 1) if found.numel() == 1 else found.reshape(rows, -1)
