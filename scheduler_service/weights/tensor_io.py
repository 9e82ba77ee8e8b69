"""Reads the bytes of stored tensors into memory of our own."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from quartet.runtime.model_files.files import opened
from quartet.scheduler_service.weights.checkpoint import DTYPES, CheckpointError, StoredTensor

CHUNK_BYTES = 32 << 20


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[int]:
    """A descriptor of a file that is read meanwhile. Any OSError becomes a CheckpointError."""
    try:
        with opened(file) as descriptor:
            yield descriptor
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def read_chunks(
    stored: StoredTensor, target: torch.Tensor | None, descriptor: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Read a tensor chunk by chunk into `target` (contiguous, of the same shape), converting dtype and device.

    Yields each chunk as (values as stored, the same values in `target`); both are flat, and the first is valid until
    the next chunk. Without a target, tensors of dtypes that are not served can be read too: their chunks are bytes.
    Raises CheckpointError.
    """
    dtype = DTYPES.get(stored.dtype, torch.uint8)
    count, per_chunk = stored.nbytes // dtype.itemsize, max(1, chunk_bytes // dtype.itemsize)
    assert target is None or (target.is_contiguous() and target.numel() == count), stored
    flat = None if target is None else target.view(-1)
    direct = flat is not None and flat.device.type == "cpu" and flat.dtype == dtype
    buffer = torch.empty(0 if direct else min(count, per_chunk), dtype=dtype)
    for start in range(0, count, per_chunk):
        size = min(per_chunk, count - start)
        part = None if flat is None else flat[start : start + size]
        values = part if direct and part is not None else buffer[:size]
        read_exactly(descriptor, bytes_of(values), stored.offset + start * dtype.itemsize, stored.file)
        if part is not None and not direct:
            part.copy_(values)
        yield values, part


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_exactly(descriptor: int, target: memoryview, offset: int, file: Path) -> None:
    """Fill `target` from the file's bytes at `offset`. Raises CheckpointError when the file ends before."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done : done + CHUNK_BYTES]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{file} was truncated while it was read, at byte {offset + done}")
        done += count
