"""Reads the bytes of stored tensors into memory of our own."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from quartet.runtime.model_files.files import opened
from quartet.scheduler_service.weights.checkpoint import DTYPES, CheckpointError, StoredTensor

CHUNK_BYTES = 32 << 20
DECODED_BYTES = 128 << 10  # the values of so many bytes and what they are computed from stay in the cache


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[int]:
    """A descriptor of a file that is read meanwhile. Any OSError becomes a CheckpointError."""
    try:
        with opened(file) as descriptor:
            yield descriptor
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def read_chunks(
    stored: StoredTensor,
    target: torch.Tensor | None,
    descriptor: int,
    chunk_bytes: int = CHUNK_BYTES,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Read a tensor chunk by chunk into `target` (contiguous, of the same shape), converting dtype and device.

    Yields each chunk as (values as stored, the same values in `target`); both are flat, and the first is valid until
    the next chunk. Of encoded tensors, and without a target, the first are bytes. `begin` and `end` choose a part of
    the tensor's bytes, whole units of it. Raises CheckpointError.
    """
    end = stored.nbytes if end is None else end
    assert target is None or (target.is_contiguous() and target.numel() == stored.index(stored.nbytes)), stored
    flat = None if target is None else target.view(-1)
    plain = stored.encoding is None
    direct = flat is not None and plain and flat.device.type == "cpu" and flat.dtype == DTYPES[stored.dtype]
    step = stored.chunk_bytes(chunk_bytes if plain else min(chunk_bytes, DECODED_BYTES))
    buffer = torch.empty(0 if direct else min(end - begin, step), dtype=torch.uint8)
    for start in range(begin, end, step):
        size = min(step, end - start)
        part = None if flat is None else flat[stored.index(start) : stored.index(start + size)]
        memory = part.view(torch.uint8) if direct and part is not None else buffer[:size]
        read_rows(stored, descriptor, bytes_of(memory), start)
        if part is None or direct:
            yield (memory if part is None else part), part
            continue
        values = stored.values(memory)
        part.copy_(values)
        yield (values if plain else memory), part


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_rows(stored: StoredTensor, descriptor: int, target: memoryview, start: int) -> None:
    """Fill `target` from byte number `start` of the tensor on, row by row where its rows are parts of longer ones."""
    if stored.pieces:
        read_pieces(stored, descriptor, target, start)
        return
    if not stored.pitch:
        read_exactly(descriptor, target, stored.offset + start, stored.file)
        return
    row_bytes, done = stored.nbytes // stored.shape[0], 0
    while done < len(target):
        row, column = divmod(start + done, row_bytes)
        size = min(row_bytes - column, len(target) - done)
        place = stored.offset + row * stored.pitch + column
        read_exactly(descriptor, target[done : done + size], place, stored.file)
        done += size


def read_pieces(stored: StoredTensor, descriptor: int, target: memoryview, start: int) -> None:
    """The same of a tensor whose rows lie in several places."""
    done, at = 0, 0  # bytes of `target`, and of the tensor in front of a piece
    for offset, size in stored.pieces:
        skipped = max(0, start + done - at)
        wanted = min(size - skipped, len(target) - done)
        if wanted > 0:
            read_exactly(descriptor, target[done : done + wanted], offset + skipped, stored.file)
            done += wanted
        at += size


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
