"""Reads what bitsandbytes writes: 4 bits as places in a table (NF4, FP4) with a scale for each block, and int8 by row.

Blocks go on over the ends of rows. Their scales may themselves be places in a table, with scales for blocks of them.
"""

import math
from typing import Annotated, Literal

import msgspec
import torch

from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import CheckpointError, Part, Quantized, StoredTensor
from quartet.scheduler_service.weights.quantized import layouts
from quartet.scheduler_service.weights.quantized.parts import Settings, Stored, misfit, part_of
from quartet.scheduler_service.weights.tensor_io import open_file, read_exactly

STATE = ".weight.quant_state.bitsandbytes__"  # in front of the type: nf4 or fp4
TYPES = ("nf4", "fp4")
MAX_STATE_BYTES = 1 << 16
INT8_SCALE = "SCB"

Size = msgspec.Meta(ge=1, le=1 << 30)


class State(msgspec.Struct):
    """The JSON beside a matrix of 4 bits."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Annotated[int, Size]
    shape: Annotated[list[Annotated[int, Size]], msgspec.Meta(min_length=2, max_length=2)]
    nested_blocksize: Annotated[int, Size] | None = None
    nested_offset: float = 0.0


def bitsandbytes(prefix: str, tensors: Stored, settings: Settings) -> Quantized | None:
    """A matrix in 4 bits or int8; None for a weight that is not quantized. Raises CheckpointError."""
    for kind in TYPES:
        if (state := tensors.get(f"{prefix}{STATE}{kind}")) is not None:
            return four_bits(prefix, tensors, kind, state)
    if f"{prefix}.{INT8_SCALE}" in tensors:
        return int8(prefix, tensors)
    return None


def four_bits(prefix: str, tensors: Stored, kind: str, stored_state: StoredTensor) -> Quantized:
    """Places in a table of 16 numbers, and a scale for each block of them. Raises CheckpointError."""
    state = read_state(prefix, stored_state)
    rows, columns = state.shape
    weight = part_of(tensors, prefix, "weight", ("U8",), 2)
    if columns % 2 or weight.shape != (rows * columns // 2, 1):
        raise misfit(weight, prefix, "weight", [rows * columns // 2, 1])
    blocks, nested = -(-rows * columns // state.blocksize), state.nested_blocksize
    lengths = {"weight.quant_map": 16, "weight.absmax": blocks}
    if nested is not None:
        lengths |= {"weight.nested_quant_map": 256, "weight.nested_absmax": -(-blocks // nested)}
    parts = {
        "weight": Part(weight, 0, each=columns // 2),
        f"weight.quant_state.bitsandbytes__{kind}": Part(stored_state, None),
    }
    for own, length in lengths.items():
        dtype = "U8" if nested is not None and own == "weight.absmax" else "F32"
        stored = part_of(tensors, prefix, own, (dtype,), 1)
        if stored.shape != (length,):
            raise misfit(stored, prefix, own, [length])
        parts[own] = Part(stored, None)

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        table = layouts.Table(state.blocksize, nested, state.nested_offset)
        return layouts.bitsandbytes(read, first * columns, table).view(-1, columns)

    return Quantized((rows, columns), parts, expand)


def read_state(prefix: str, stored: StoredTensor) -> State:
    """The JSON of a matrix. Raises CheckpointError for what it cannot be."""
    if stored.dtype != "U8" or len(stored.shape) != 1 or stored.nbytes > MAX_STATE_BYTES:
        raise CheckpointError(f"{stored.shown}: the quant_state of {short(prefix)}.weight is {stored.dtype}, not JSON")
    data = bytearray(stored.nbytes)
    with open_file(stored.file) as descriptor:
        read_exactly(descriptor, memoryview(data), stored.offset, stored.file)
    try:
        state = msgspec.json.decode(data, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{stored.shown}: the quant_state of {short(prefix)}.weight: {short(error)}") from error
    if not math.isfinite(state.nested_offset):
        raise CheckpointError(f"{stored.shown}: the quant_state of {short(prefix)}.weight: nested_offset is not finite")
    return state


def int8(prefix: str, tensors: Stored) -> Quantized:
    """Whole bytes with a sign; each row has the largest of its values, which stands for 127."""
    weight = part_of(tensors, prefix, "weight", ("I8",), 2)
    rows, columns = weight.shape
    largest = part_of(tensors, prefix, INT8_SCALE, ("F32",), 1)
    if largest.shape != (rows,):
        raise misfit(largest, prefix, INT8_SCALE, [rows])

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        values: torch.Tensor = read["weight"].float() * (read[INT8_SCALE] / 127).unsqueeze(1)
        return values

    parts = {"weight": Part(weight, 0, across=1), INT8_SCALE: Part(largest, 0)}
    return Quantized((rows, columns), parts, expand, unit_columns=1)
