"""Reads what torchao writes to safetensors files: int8, int4, whole numbers of fewer bits in int8, and FP8.

A tensor X.weight is stored as X._weight_qdata and further parts. Which kind of tensor it is stands in the file's
metadata, but follows from the parts as well; the metadata says only how many columns a matrix in tiles has.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import torch

from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import CheckpointError, Part, Quantized, StoredTensor, read_metadata
from quartet.scheduler_service.weights.quantized import layouts
from quartet.scheduler_service.weights.quantized.compressed import groups_of, rows_of, unit_of
from quartet.scheduler_service.weights.quantized.parts import (
    FLOAT8,
    SCALES,
    Settings,
    Stored,
    misfit,
    part_of,
    scaled,
)
from quartet.scheduler_service.weights.quantized.scaled_rows import ScaledRows, scheme_of

NUMBERS, SCALE, ZEROS = "_weight_qdata", "_weight_scale", "_weight_zero_point"
BOTH = "_weight_scale_and_zero"
TILE_ROWS, WORD_COLUMNS = 8, 32
NOT_READ = (
    "{}: {} of torchao is a kind of tensor that is not read ({}); what is read is Int4Tensor, "
    "Int4TilePackedTo4dTensor, Int8Tensor, IntxUnpackedToInt8Tensor and Float8Tensor"
)


class Attributes(msgspec.Struct):
    shape: tuple[int, ...]


class Described(msgspec.Struct):
    """What the metadata of a file says of one tensor."""

    data: Attributes = msgspec.field(name="_data")


def torchao(prefix: str, tensors: Stored, settings: Settings) -> Quantized:
    """A matrix of whole numbers or FP8. Raises CheckpointError."""
    numbers = tensors[f"{prefix}.{NUMBERS}"]
    zeros = tensors.get(f"{prefix}.{ZEROS}")
    if f"{prefix}._weight_act_pre_scale" in tensors:
        raise unknown(prefix, numbers, "activations are scaled before")
    if f"{prefix}.{BOTH}" in tensors:
        return int4_tiles(prefix, tensors)
    if len(numbers.shape) != 2 or numbers.dtype not in ("I8", *FLOAT8):
        raise unknown(prefix, numbers, f"{numbers.dtype} {list(numbers.shape)}")
    if zeros is not None and zeros.dtype in SCALES:
        return int4(prefix, tensors)
    if zeros is not None and zeros.dtype != "I8":
        raise unknown(prefix, numbers, f"zero points in {zeros.dtype}")
    numbers = part_of(tensors, prefix, NUMBERS, ("I8", *FLOAT8), 2)
    rows, columns = numbers.shape
    scales = part_of(tensors, prefix, SCALE, SCALES, 2)
    if scales.shape != (1, 1) and (scales.shape[0] != rows or columns % scales.shape[1]):
        raise misfit(scales, prefix, SCALE, [rows, 1])
    parts = {NUMBERS: Part(numbers, 0, across=1), SCALE: rows_of(scales, rows, columns)}
    groups = groups_of(scales)
    if numbers.dtype in FLOAT8:
        return Quantized((rows, columns), parts, float8, unit_columns=unit_of(columns, groups))
    if zeros is not None:
        if zeros.shape != scales.shape:
            raise misfit(zeros, prefix, ZEROS, list(scales.shape))
        parts[ZEROS] = rows_of(zeros, rows, columns)
    scheme = scheme_of(8, columns, groups, None if zeros is not None else 128)
    return scaled((rows, columns), parts, whole_numbers, 1, scheme, unit_of(columns, groups))


def int4(prefix: str, tensors: Stored) -> Quantized:
    """Int4Tensor: two numbers in a byte, scales and zeros with a column for each row."""
    numbers = part_of(tensors, prefix, NUMBERS, ("I8",), 2)
    rows, columns = numbers.shape[0], 2 * numbers.shape[1]
    scales, zeros = (part_of(tensors, prefix, own, SCALES, 2) for own in (SCALE, ZEROS))
    groups = scales.shape[0]
    for own, part in ((SCALE, scales), (ZEROS, zeros)):
        if part.shape != (groups, rows) or columns % groups:
            raise misfit(part, prefix, own, [groups, rows])
    size = columns // groups
    parts = {NUMBERS: Part(numbers, 0, across=1, unit=(2, 1))}
    parts |= {own: Part(part, 1, across=0, unit=(size, 1)) for own, part in ((SCALE, scales), (ZEROS, zeros))}
    scheme = scheme_of(4, columns, groups)
    return scaled((rows, columns), parts, layouts.int4_with_signs, 1, scheme, math.lcm(2, size))


def int4_tiles(prefix: str, tensors: Stored) -> Quantized:
    """Int4TilePackedTo4dTensor: in the order of CUDA's tensor cores, filled up to whole tiles."""
    words = part_of(tensors, prefix, NUMBERS, ("I32",), 4)
    both = part_of(tensors, prefix, BOTH, ("BF16",), 3)
    tiles, steps, lanes, runs = words.shape
    rows, columns = shape_of(prefix, words)
    filled, groups = steps * runs * WORD_COLUMNS, both.shape[0]
    if lanes != 4 * TILE_ROWS or -(-rows // TILE_ROWS) != tiles or not 0 < columns <= filled:
        raise misfit(words, prefix, NUMBERS, [-(-rows // TILE_ROWS), steps, 4 * TILE_ROWS, runs])
    if both.shape != (groups, tiles * TILE_ROWS, 2) or filled % groups or columns % (filled // groups):
        raise misfit(both, prefix, BOTH, [groups, tiles * TILE_ROWS, 2])
    parts = {NUMBERS: Part(words, 0, TILE_ROWS), BOTH: Part(both, 1)}

    def layout(read: dict[str, torch.Tensor]) -> ScaledRows:
        return layouts.int4_tiles(read, columns)

    scheme = scheme_of(4, columns, columns // (filled // groups))
    return scaled((rows, columns), parts, layout, TILE_ROWS, scheme)


def shape_of(prefix: str, stored: StoredTensor) -> tuple[int, int]:
    """The shape of a matrix by the metadata of its file. Raises CheckpointError."""
    said = metadata_of(stored.file, stored.file.stat().st_mtime_ns).get(f"{prefix}.weight")
    try:
        shape = msgspec.json.decode(said if isinstance(said, str) else "", type=Described).data.shape
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{stored.shown}: its metadata do not give the shape of {short(prefix)}.weight"
        ) from error
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(f"{stored.shown}: its metadata give {short(prefix)}.weight the shape {short(shape)}")
    return shape[0], shape[1]


@lru_cache(maxsize=4)
def metadata_of(file: Path, changed_ns: int) -> Mapping[str, Any]:
    """The metadata of a file; `changed_ns` is when it was changed last."""
    return read_metadata(file)


def whole_numbers(read: dict[str, torch.Tensor]) -> ScaledRows:
    return layouts.int8({name.removeprefix("_").replace("_qdata", ""): part for name, part in read.items()})


def float8(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
    return layouts.float8({"weight": read[NUMBERS], SCALE: read[SCALE]}, SCALE)


def unknown(prefix: str, stored: StoredTensor, why: str) -> CheckpointError:
    return CheckpointError(NOT_READ.format(stored.shown, f"{short(prefix)}.weight", why))
