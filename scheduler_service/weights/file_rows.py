"""Rows of a quantized tensor that stay in its file, and are read when a step asks for them.

A step reads a row of the embeddings for each of its tokens and no others, so a table that is not the head as well need
not be in memory. The descriptor stays open: a file that is replaced by another one is served until an update.
"""

import os

import torch

from quartet.kernels.cpu.native.quantized import QuantizedRows
from quartet.scheduler_service.weights.checkpoint import StoredTensor
from quartet.scheduler_service.weights.tensor_io import bytes_of, read_exactly

ROWS_AT_ONCE = 1024


class FileRows:
    """Numbers of rows (count,) int64 → (count, columns) bfloat16, the values that a QuantizedWeight would give."""

    def __init__(self, stored: StoredTensor, descriptor: int) -> None:
        """A tensor for which `are_possible`, and a descriptor of its file. Raises OSError."""
        assert stored.encoding is not None and stored.encoding.numbers is not None, stored
        self._stored = stored
        self._numbers = stored.encoding.numbers
        self._row_bytes = stored.nbytes // stored.shape[0]
        self._file = os.fdopen(os.dup(descriptor), "rb", buffering=0)  # closed with the last user of these rows
        self._identity = self._look()

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Raises RuntimeError where the file is not what it was."""
        if self._look() != self._identity:
            raise RuntimeError(f"{self._stored.shown} was written to while its embeddings were served from it")
        some, place = torch.unique(ids, return_inverse=True)
        values = torch.empty(len(some), self._stored.shape[1], dtype=torch.bfloat16)
        for begin in range(0, len(some), ROWS_AT_ONCE):
            part = some[begin : begin + ROWS_AT_ONCE].tolist()
            values[begin : begin + len(part)] = values_of(self._numbers(self._read(part), self._stored.shape[1]))
        return values[place]

    def _read(self, ids: list[int]) -> torch.Tensor:
        """The bytes of rows whose numbers rise."""
        neighbours = ids[-1] - ids[0] == len(ids) - 1
        shape = (1, len(ids) * self._row_bytes) if neighbours else (len(ids), self._row_bytes)
        memory = torch.empty(shape, dtype=torch.uint8)
        for id, piece in zip(ids, memory, strict=False):
            offset = self._stored.offset + id * self._row_bytes
            read_exactly(self._file.fileno(), bytes_of(piece), offset, self._stored.file)
        return memory.flatten()

    def _look(self) -> tuple[int, int]:
        """What changes when the file is written to, and not when another takes its name."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


def values_of(rows: QuantizedRows) -> torch.Tensor:
    """The values (rows, columns) bfloat16 of numbers, with scales in float16 as kernels keep them."""
    scales = rows.scales.half().float()
    offsets = -scales * rows.scheme.zero_point if rows.offsets is None else rows.offsets.half().float()
    numbers = rows.numbers.unflatten(1, (-1, rows.scheme.group_size)).float()
    values: torch.Tensor = numbers * scales.unsqueeze(2) + offsets.unsqueeze(2)  # the product is exact
    return values.flatten(1).bfloat16()


def are_possible(stored: StoredTensor) -> bool:
    """Whether each row of a tensor is whole blocks, in the order of the model, and can be read by itself."""
    encoding = stored.encoding
    if encoding is None or encoding.numbers is None or len(stored.shape) != 2 or stored.pitch or stored.pieces:
        return False
    return stored.shape[1] % encoding.unit_values == 0
