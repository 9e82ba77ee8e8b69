"""Reads quantized tensors: some rows at a time, so a load takes no more memory than the weights themselves."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch

from quartet.kernels.cpu.linear import no_pause
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
    """Read a tensor to its place, whatever that is. Raises CheckpointError, also for values that are not finite."""
    with weights.writing(name, yield_point) as target, ExitStack() as files:
        opened = {file: files.enter_context(open_file(file)) for file in {p.stored.file for p in tensor.parts.values()}}
        for begin, end in ranges(tensor, piece_values):
            yield_point()
            parts = {
                own: read_rows(part, begin, end, opened[part.stored.file]).to(target.device)
                for own, part in tensor.parts.items()
            }
            try:
                target[begin:end].copy_(tensor.expand(parts, begin))
            except ValueError as error:
                raise CheckpointError(f"{tensor.shown}: tensor {name}: {error}") from error
            if not bool(torch.isfinite(target[begin:end]).all()):
                raise CheckpointError(f"tensor {name} holds values that are not finite")


def ranges(tensor: Quantized, piece_values: int) -> Iterator[tuple[int, int]]:
    """The rows that are read together: about so many values, whole units."""
    rows, columns = tensor.shape
    step = max(1, piece_values // columns // tensor.unit_rows) * tensor.unit_rows
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


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
