"""Reads what torchao writes to safetensors files: int8, whole numbers of fewer bits in int8, and FP8.

A tensor X.weight is stored as X._weight_qdata, X._weight_scale and, for whole numbers, X._weight_zero_point. Which
kind of tensor it is stands in the file's metadata, but follows from the parts as well.
"""

import torch

from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import CheckpointError, Part, Quantized, StoredTensor
from quartet.scheduler_service.weights.quantized import layouts
from quartet.scheduler_service.weights.quantized.compressed import groups_of, rows_of
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
NOT_READ = (
    "{}: {} of torchao is a kind of tensor that is not read ({}); what is read is Int8Tensor, IntxUnpackedToInt8Tensor "
    "and Float8Tensor"
)


def torchao(prefix: str, tensors: Stored, settings: Settings) -> Quantized:
    """A matrix of whole numbers or FP8. Raises CheckpointError."""
    numbers = tensors[f"{prefix}.{NUMBERS}"]
    zeros = tensors.get(f"{prefix}.{ZEROS}")
    if len(numbers.shape) != 2 or numbers.dtype not in ("I8", *FLOAT8):
        raise unknown(prefix, numbers, f"{numbers.dtype} {list(numbers.shape)}")
    if zeros is not None and zeros.dtype != "I8":
        raise unknown(prefix, numbers, f"zero points in {zeros.dtype}")
    if f"{prefix}._weight_act_pre_scale" in tensors:
        raise unknown(prefix, numbers, "activations are scaled before")
    numbers = part_of(tensors, prefix, NUMBERS, ("I8", *FLOAT8), 2)
    rows, columns = numbers.shape
    scales = part_of(tensors, prefix, SCALE, SCALES, 2)
    if scales.shape != (1, 1) and (scales.shape[0] != rows or columns % scales.shape[1]):
        raise misfit(scales, prefix, SCALE, [rows, 1])
    parts = {NUMBERS: Part(numbers, 0), SCALE: rows_of(scales, rows)}
    if numbers.dtype in FLOAT8:
        return Quantized((rows, columns), parts, float8)
    if zeros is not None:
        if zeros.shape != scales.shape:
            raise misfit(zeros, prefix, ZEROS, list(scales.shape))
        parts[ZEROS] = rows_of(zeros, rows)
    zero_point = None if zeros is not None else 128
    return scaled((rows, columns), parts, whole_numbers, 1, scheme_of(8, columns, groups_of(scales), zero_point))


def whole_numbers(read: dict[str, torch.Tensor]) -> ScaledRows:
    return layouts.int8({name.removeprefix("_").replace("_qdata", ""): part for name, part in read.items()})


def float8(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
    return layouts.float8({"weight": read[NUMBERS], SCALE: read[SCALE]}, SCALE)


def unknown(prefix: str, stored: StoredTensor, why: str) -> CheckpointError:
    return CheckpointError(NOT_READ.format(stored.shown, f"{short(prefix)}.weight", why))
