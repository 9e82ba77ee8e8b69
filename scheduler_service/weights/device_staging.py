"""Bring a checkpoint's tensors to a GPU: several threads read, and every chunk is sent on while the next is read.

    file ──preadv──► page-locked chunk ──copy engine──► its place in the buffers (by way of a scratch chunk, if the
                     (two a thread)                     checkpoint has another dtype)

What is wrong with the values is found on the device, once, at the end. Nothing here touches what is served.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
import xxhash

from quartet.runtime.model_files.files import open_regular
from quartet.scheduler_service.host.transfer import Arrival
from quartet.scheduler_service.weights.checkpoint import (
    DTYPES,
    Checkpoint,
    CheckpointError,
    StoredTensor,
    bytes_of,
    read_exactly,
)
from quartet.scheduler_service.weights.parameters import Weights

THREADS = 8
CHUNK_BYTES = 8 << 20  # page-locking memory takes longer than reading into it: little of it, used again and again
Digest = Callable[
    [str, str], None
]  # (name, xxh3 of its bytes): raises CheckpointError where it is not the one expected


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of one tensor, read by one thread in the order of the file."""

    name: str
    stored: StoredTensor
    place: torch.Tensor | None  # the whole tensor on the device, flat; None: only read and hashed
    start: int  # bytes from the tensor's beginning
    stop: int


@dataclass(slots=True)
class Chunk:
    """Page-locked memory, and when the device is done with what was in it."""

    memory: torch.Tensor  # (bytes,) uint8
    done: Arrival | None = None


@dataclass(slots=True)
class Reader:
    """One thread's buffers and stream."""

    device: torch.device
    chunk_bytes: int
    digest: Digest | None
    chunks: list[Chunk] = field(default_factory=list)
    stream: torch.cuda.Stream | None = None
    turn: int = 0

    def __post_init__(self) -> None:
        pinned = self.device.type == "cuda"
        self.chunks = [Chunk(torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=pinned)) for _ in range(2)]
        if pinned:
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.default_stream(self.device))  # the last swap may still read the target

    def read(self, pieces: "SimpleQueue[Piece]", stop: threading.Event) -> None:
        """Read pieces until there are no more, and wait until they have arrived."""
        descriptors: dict[Path, int] = {}
        try:
            with torch.no_grad(), torch.cuda.stream(self.stream):  # no stream: the context does nothing
                for piece in taken(pieces, stop):
                    self.read_piece(piece, opened(piece.stored.file, descriptors))
                Arrival(self.device).wait()
        except BaseException:
            stop.set()
            raise
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    def read_piece(self, piece: Piece, descriptor: int) -> None:
        digest = None if self.digest is None else xxhash.xxh3_64()
        for start in range(piece.start, piece.stop, self.chunk_bytes):
            size = min(self.chunk_bytes, piece.stop - start)
            chunk = self.free_chunk()
            memory = chunk.memory[:size]
            read_exactly(descriptor, bytes_of(memory), piece.stored.offset + start, piece.stored.file)
            if digest is not None:
                digest.update(bytes_of(memory))
            if piece.place is not None:
                put(memory, piece.stored, piece.place, start)
                chunk.done = Arrival(self.device)
        if digest is not None and self.digest is not None:
            self.digest(piece.name, digest.hexdigest())

    def free_chunk(self) -> Chunk:
        """The chunk that was used longest ago, once the device has taken what was in it."""
        chunk = self.chunks[self.turn % len(self.chunks)]
        self.turn += 1
        if chunk.done is not None:
            chunk.done.wait()
        return chunk


def taken(pieces: "SimpleQueue[Piece]", stop: threading.Event) -> Iterator[Piece]:
    """Pieces until there are none, or until another thread has failed."""
    while not stop.is_set():
        try:
            yield pieces.get_nowait()
        except Empty:
            return


def opened(file: Path, descriptors: dict[Path, int]) -> int:
    if file not in descriptors:
        try:
            descriptors[file] = open_regular(file)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    return descriptors[file]


def put(memory: torch.Tensor, stored: StoredTensor, place: torch.Tensor, start: int) -> None:
    """Send a chunk's bytes to their elements of `place`, converted on the device."""
    values = memory.view(DTYPES[stored.dtype])
    first = start // values.element_size()
    target = place[first : first + len(values)]
    if values.dtype == target.dtype:
        target.copy_(values, non_blocking=True)
    else:
        target.copy_(values.to(target.device, non_blocking=True))


def read(
    checkpoint: Checkpoint,
    names: list[str],
    target: Weights,
    digest: Digest | None = None,
    threads: int = THREADS,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Copy tensors to their places. Raises CheckpointError, also for values that are not finite; the contents of
    `target` are undefined then. With `digest` every tensor is hashed on its way, and those without a place, too."""
    pieces: SimpleQueue[Piece] = SimpleQueue()
    for piece in cut(checkpoint, names, target, chunk_bytes, whole=digest is not None):
        pieces.put(piece)
    stop = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        readers = [Reader(target.device, chunk_bytes, digest) for _ in range(threads)]
        for done in [pool.submit(reader.read, pieces, stop) for reader in readers]:
            done.result()
    check_finite(target, [name for name in names if name in target.layout.places])


def cut(checkpoint: Checkpoint, names: list[str], target: Weights, chunk_bytes: int, whole: bool) -> Iterator[Piece]:
    """The pieces of all tensors, in the order of the file; a tensor that is hashed stays in one."""
    for name in names:
        stored = checkpoint.tensors[name]
        place = target.view(name).view(-1) if name in target.layout.places else None
        size = max(1, stored.nbytes) if whole else chunk_bytes
        for start in range(0, stored.nbytes, size):
            yield Piece(name, stored, place, start, min(stored.nbytes, start + size))


def check_finite(weights: Weights, names: list[str]) -> None:
    """Raise CheckpointError for NaN and infinities: one look at the device for all tensors."""
    views = [weights.view(name) for name in names]
    if not views:
        return
    bounds = torch.stack([torch.stack(view.aminmax()).float() for view in views])  # (names, 2)
    for name, finite in zip(names, bounds.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise CheckpointError(f"tensor {name} holds values that are not finite")


def changed(live: Weights, staged: Weights, names: list[str]) -> frozenset[str]:
    """The tensors whose bits differ, found where they lie; a device compares as fast as it copies."""
    differ = [(bits(live.view(name)) != bits(staged.view(name))).any() for name in names]
    return frozenset(name for name, is_new in zip(names, torch.stack(differ).tolist(), strict=True) if is_new)


def bits(values: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: NaN equals itself, and 0.0 is not -0.0."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
