"""Reads quantized tensors: some rows at a time, so a load takes no more memory than the weights themselves."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from quartet.kernels.cpu.linear import no_pause
from quartet.kernels.cpu.native.library import BLOCK_COLUMNS
from quartet.kernels.cpu.native.quantized import QuantizedRows
from quartet.scheduler_service.weights.checkpoint import CheckpointError, Part, Quantized, StoredTensor
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
        for piece in pieces(tensor, piece_values, tensor.unit_rows, yield_point):
            on_device = {own: part.to(target.device) for own, part in piece.parts.items()}
            values = tensor.expand(on_device, piece.first)
            if (columns := own_columns(tensor)) is not None:
                values = values.narrow(1, *columns)
            place = target[piece.begin : piece.end]
            place.copy_(values)
            if not bool(torch.isfinite(place).all()):
                raise CheckpointError(f"tensor {name} holds values that are not finite")


def read_numbers(
    name: str, tensor: Quantized, weights: Weights, piece_values: int, yield_point: Callable[[], None]
) -> None:
    """Write the numbers of a tensor to its place, whole blocks of rows at a time."""
    place = weights.quantized_of(name)
    assert place is not None and tensor.scheme is not None and tensor.numbers is not None, name
    unit = math.lcm(tensor.unit_rows, BLOCK_COLUMNS)
    begun: list[QuantizedRows] = []  # rows of a block within which a range ended
    for piece in pieces(tensor, piece_values, unit, yield_point):
        rows = tensor.numbers(piece.parts, piece.first).to(tensor.scheme)
        if (columns := own_columns(tensor)) is not None:
            rows = rows.columns(*columns)
        rows = rows.to(place.scheme)
        if not rows.fits():
            raise CheckpointError(f"{tensor.shown}: tensor {name} has scales that are too large or not finite")
        rows = QuantizedRows.below([*begun, rows])
        count = len(rows.numbers)
        whole = count if piece.end == tensor.shape[0] else count // BLOCK_COLUMNS * BLOCK_COLUMNS
        if whole:
            weights.write(name, rows.part(0, whole), piece.end - count, yield_point)
        begun = [rows.select(torch.arange(whole, count))] if whole < count else []  # a copy: the piece is freed


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows that are read together."""

    begin: int  # the first one, of those that are wanted
    end: int
    first: int  # the first one, of the whole tensor
    parts: dict[str, torch.Tensor]


def pieces(tensor: Quantized, piece_values: int, unit_rows: int, yield_point: Callable[[], None]) -> Iterator[Piece]:
    """All wanted rows, about so many values at a time, each piece from one range of rows."""
    columns = columns_read(tensor)
    width = math.prod(tensor.shape[1:]) if columns is None else columns[1] - columns[0]
    step = max(1, piece_values // width // unit_rows) * unit_rows
    done = 0
    with ExitStack() as files:
        opened = {file: files.enter_context(open_file(file)) for file in {p.stored.file for p in tensor.parts.values()}}
        for start, length in ranges_of(tensor):
            for first in range(start, start + length, length if tensor.at_once else step):
                yield_point()
                last = start + length if tensor.at_once else min(first + step, start + length)
                read = {
                    own: read_part(p, (first, last), columns, opened[p.stored.file]) for own, p in tensor.parts.items()
                }
                yield Piece(done, done + last - first, first, read)
                done += last - first


def ranges_of(tensor: Quantized) -> tuple[tuple[int, int], ...]:
    """First row and length of the ranges of rows of the whole tensor that are wanted."""
    if tensor.cut is None or tensor.cut.dimension:
        return ((0, tensor.shape[0]),)
    return tensor.cut.spans


def columns_read(tensor: Quantized) -> tuple[int, int] | None:
    """The first column that is read and the last one plus one: whole units around those wanted; None: all."""
    if tensor.cut is None or not tensor.cut.dimension or not tensor.unit_columns:
        return None
    unit, ((first, length),) = tensor.unit_columns, tensor.cut.spans
    return first // unit * unit, min(-(-(first + length) // unit) * unit, tensor.cut.whole[1])


def own_columns(tensor: Quantized) -> tuple[int, int] | None:
    """Of the columns that are read the first one that is wanted, and how many are; None: all."""
    if tensor.cut is None or not tensor.cut.dimension:
        return None
    ((first, length),) = tensor.cut.spans
    begin, _ = columns_read(tensor) or (0, 0)
    return first - begin, length


def read_part(part: Part, rows: tuple[int, int], columns: tuple[int, int] | None, descriptor: int) -> torch.Tensor:
    """What a part holds of some rows and columns of the tensor; each is given as the first and the last plus one."""
    stored = part.stored
    shape = list(stored.shape)
    ranges = {axis: (0, size) for axis, size in enumerate(shape)}
    if part.axis is not None:
        ranges[part.axis] = rows[0] * part.each // part.per, -(-rows[1] * part.each // part.per)
    if part.across is not None and columns is not None:
        width, places = part.unit
        ranges[part.across] = columns[0] // width * places, -(-columns[1] // width) * places
    for axis, (first, last) in ranges.items():
        shape[axis] = last - first
    found = torch.empty(shape, dtype=TYPES[stored.dtype])
    read_box(stored, ranges, found, descriptor)
    return found


def read_box(stored: StoredTensor, ranges: dict[int, tuple[int, int]], found: torch.Tensor, descriptor: int) -> None:
    """Fill `found` with the elements of a stored tensor that lie in ranges of its first two axes."""
    first, _ = ranges.get(0, (0, 1))
    pitch = stored.pitch or stored.nbytes // max(1, stored.shape[0] if stored.shape else 1)
    place_bytes, (column, last) = pitch, ranges.get(1, (0, 1))
    if len(stored.shape) > 1:
        place_bytes = stored.nbytes // (stored.shape[0] * stored.shape[1])
    start = stored.offset + first * pitch + column * place_bytes
    if not stored.pitch and (len(stored.shape) < 2 or last - column == stored.shape[1]):
        read_exactly(descriptor, bytes_of(found), start, stored.file)
        return
    for number, line in enumerate(found):  # each is one piece of the file
        read_exactly(descriptor, bytes_of(line), start + number * pitch, stored.file)
