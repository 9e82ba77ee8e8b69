"""What the methods of quantization share: their stored parts, checked against each other, and matrices in FP8."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from quartet.kernels.cpu.native.quantized import UNIT, QuantizedRows, Scheme
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import CheckpointError, Part, Quantized, StoredTensor
from quartet.scheduler_service.weights.quantized import layouts
from quartet.scheduler_service.weights.quantized.scaled_rows import ScaledRows

Settings = Mapping[str, Any]
Stored = Mapping[str, StoredTensor]
WORDS = ("I32",)
SCALES = ("F16", "BF16", "F32")
MAX_BLOCK = 1 << 20
FLOAT8 = ("F8_E4M3", "F8_E5M2")


def part_of(tensors: Stored, prefix: str, own: str, dtypes: Iterable[str], rank: int) -> StoredTensor:
    """A part that must be there. Raises CheckpointError, naming it, also for a dtype or a rank that cannot be."""
    name = f"{prefix}.{own}"
    if (stored := tensors.get(name)) is None:
        raise CheckpointError(f"the checkpoint lacks {short(name)}, a part of the quantized {short(prefix)}.weight")
    if stored.dtype not in dtypes or len(stored.shape) != rank or not all(stored.shape):
        raise CheckpointError(
            f"{stored.shown}: tensor {short(name)} is {stored.dtype} {list(stored.shape)}, which cannot be"
        )
    return stored


def choice(settings: Settings, name: str, default: Any, allowed: tuple[Any, ...]) -> Any:
    """A setting with one of the values that are read. Raises CheckpointError."""
    value = settings.get(name, default)
    if type(value) is not type(allowed[0]) or value not in allowed:
        said = ", ".join(map(repr, allowed))
        raise CheckpointError(f"quantization_config: {name} is {short(repr(value))}; what is read is {said}")
    return value


def misfit(stored: StoredTensor, prefix: str, own: str, needed: list[int]) -> CheckpointError:
    return CheckpointError(
        f"{stored.shown}: tensor {short(prefix)}.{own} has shape {list(stored.shape)}, its other parts need {needed}"
    )


def scaled(
    shape: tuple[int, int],
    parts: dict[str, Part],
    layout: Callable[[dict[str, torch.Tensor]], ScaledRows],
    unit_rows: int = 1,
    scheme: Scheme | None = None,
    unit_columns: int = 0,
) -> Quantized:
    """A matrix of numbers with scales, which `layout` makes of its parts, or of those of some of its columns."""

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        return layout(read).values()

    def numbers(read: dict[str, torch.Tensor], first: int) -> QuantizedRows:
        assert scheme is not None
        return layout(read).in_scheme(scheme)

    if scheme is None:
        return Quantized(shape, parts, expand, unit_rows, unit_columns=unit_columns)
    return Quantized(shape, parts, expand, unit_rows, scheme, numbers, math.lcm(unit_columns, UNIT))


def float8(prefix: str, tensors: Stored, settings: Settings, scale: str) -> Quantized | None:
    """FP8 with a scale for all, for each row or for each block; None for a weight that is not FP8."""
    weight = tensors[f"{prefix}.weight"]
    if weight.dtype not in FLOAT8:
        return None
    weight = part_of(tensors, prefix, "weight", FLOAT8, 2)
    rows, columns = weight.shape
    block = settings.get("weight_block_size")
    own = scale if f"{prefix}.{scale}" in tensors else "weight_scale_inv"
    rank = len(tensors[f"{prefix}.{own}"].shape) if f"{prefix}.{own}" in tensors else 0
    stored = part_of(tensors, prefix, own, SCALES, min(rank, 2))
    shape = (rows, columns)
    if block:
        if (
            not isinstance(block, list)
            or len(block) != 2
            or not all(type(size) is int and 0 < size < MAX_BLOCK for size in block)
        ):
            raise CheckpointError(f"quantization_config: weight_block_size is {short(block)}; it must be two sizes")
        needed = [-(-rows // block[0]), -(-columns // block[1])]
        if list(stored.shape) != needed:
            raise misfit(stored, prefix, own, needed)
        scales = Part(stored, 0, block[0], across=1, unit=(block[1], 1))
        expand_blocks = partial(block_values, scale=own, block=(block[0], block[1]))
        return Quantized(
            shape, {"weight": Part(weight, 0, across=1), own: scales}, expand_blocks, unit_columns=block[1]
        )
    one = all(size == 1 for size in stored.shape)
    if not one and stored.shape not in ((rows,), (rows, 1)):
        raise misfit(stored, prefix, own, [rows, 1])

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        return layouts.float8(read, own)

    parts = {"weight": Part(weight, 0, across=1), own: Part(stored, None if one else 0)}
    return Quantized(shape, parts, expand, unit_columns=1)


def block_values(read: dict[str, torch.Tensor], first: int, scale: str, block: tuple[int, int]) -> torch.Tensor:
    return layouts.float8_blocks(read, scale, block, first % block[0])
