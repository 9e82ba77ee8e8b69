"""Reads quantized tensors: some rows at a time, so a load takes no more memory than the weights themselves."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch

from quartet.kernels.cpu.linear import no_pause
from quartet.kernels.cpu.native.library import BLOCK_COLUMNS
from quartet.scheduler_service.weights.checkpoint import CheckpointError, Part, Quantized
from quartet.scheduler_service.weights.parameters import Weights
from quartet.scheduler_service.weights.tensor_io import bytes_of, open_file, read_exactly

PIECE_VALUES = 1 << 20
TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_quantized(
    name: str,
    tensor: Quantized,
    weights: Weights,
    piece_values: int = PIECE_VALUES,
    yield_point: Callable[[], None] = no_pause,
) -> None:
    """Read a tensor to its place, whatever that is: its numbers as they are stored where the place takes them.

    Raises CheckpointError, also for values that are not finite.
    """
    try:
        if stays(name, tensor, weights):
            read_numbers(name, tensor, weights, piece_values, yield_point)
        else:
            read_values(name, tensor, weights, piece_values, yield_point)
    except ValueError as error:
        raise CheckpointError(f"{tensor.shown}: tensor {name}: {error}") from error


def stays(name: str, tensor: Quantized, weights: Weights) -> bool:
    """Whether a tensor's numbers are kept as they are stored, because its place takes them so."""
    place = weights.quantized_of(name) if name in weights.layout.places else None
    return place is not None and tensor.scheme is not None and tensor.scheme.joined(place.scheme) == place.scheme


def read_values(
    name: str, tensor: Quantized, weights: Weights, piece_values: int, yield_point: Callable[[], None]
) -> None:
    """Write the values of a tensor to its place."""
    with weights.writing(name, yield_point) as target:
        for begin, end, parts in pieces(tensor, piece_values, tensor.unit_rows, yield_point):
            on_device = {own: part.to(target.device) for own, part in parts.items()}
            target[begin:end].copy_(tensor.expand(on_device, begin))
            if not bool(torch.isfinite(target[begin:end]).all()):
                raise CheckpointError(f"tensor {name} holds values that are not finite")


def read_numbers(
    name: str, tensor: Quantized, weights: Weights, piece_values: int, yield_point: Callable[[], None]
) -> None:
    """Write the numbers of a tensor to its place, whole blocks of rows at a time."""
    place = weights.quantized_of(name)
    assert place is not None and tensor.numbers is not None, name
    unit = math.lcm(tensor.unit_rows, BLOCK_COLUMNS)
    for begin, _, parts in pieces(tensor, piece_values, unit, yield_point):
        rows = tensor.numbers(parts, begin).to(place.scheme)
        if not rows.fits():
            raise CheckpointError(f"{tensor.shown}: tensor {name} has scales that are too large or not finite")
        weights.write(name, rows, begin, yield_point)


def pieces(
    tensor: Quantized, piece_values: int, unit_rows: int, yield_point: Callable[[], None]
) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
    """The first row, the last row plus one, and the parts of rows that are read together: about so many values."""
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(1, piece_values // columns // unit_rows) * unit_rows
    with ExitStack() as files:
        opened = {file: files.enter_context(open_file(file)) for file in {p.stored.file for p in tensor.parts.values()}}
        for begin in range(0, rows, step):
            yield_point()
            end = min(begin + step, rows)
            yield begin, end, {own: read_rows(p, begin, end, opened[p.stored.file]) for own, p in tensor.parts.items()}


def read_rows(part: Part, begin: int, end: int, descriptor: int) -> torch.Tensor:
    """What a part holds of some rows of the tensor, in the part's own shape along the other axis."""
    stored, dtype = part.stored, TYPES[part.stored.dtype]
    shape = list(stored.shape)
    if part.axis is None:
        found = torch.empty(shape, dtype=dtype)
        read_exactly(descriptor, bytes_of(found), stored.offset, stored.file)
        return found
    first, last = begin * part.each // part.per, -(-end * part.each // part.per)
    shape[part.axis] = last - first
    found = torch.empty(shape, dtype=dtype)
    lines = found if part.axis == 1 else found.view(1, -1)  # each is one piece of the file
    pitch = stored.nbytes // len(lines)
    start = stored.offset + first * (pitch // stored.shape[part.axis])
    for number, line in enumerate(lines):
        read_exactly(descriptor, bytes_of(line), start + number * pitch, stored.file)
    return found
