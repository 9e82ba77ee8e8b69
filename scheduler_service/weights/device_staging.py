"""Copies a checkpoint's tensors to a GPU: several threads read, and each chunk is sent while the next is read.

    file ──preadv──► page-locked chunk ──copy engine──► its place in the buffers (by way of a temporary tensor, if the
                     (two a thread)                     checkpoint has another dtype)

The values are checked on the device, once, at the end. Nothing here touches what is served.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
import xxhash

from quartet.scheduler_service.host.transfer import Arrival
from quartet.scheduler_service.weights.checkpoint import DTYPES, Checkpoint, CheckpointError, StoredTensor
from quartet.scheduler_service.weights.parameters import Weights
from quartet.scheduler_service.weights.tensor_io import bytes_of, open_file, read_exactly

THREADS = 8
CHUNK_BYTES = 8 << 20  # page-locking memory takes longer than reading into it: little of it, reused many times
CheckDigest = Callable[[str, str], None]  # (name, xxh3 of its bytes) → raises CheckpointError for a wrong one


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of one tensor, read by one thread in the order of the file."""

    name: str
    stored: StoredTensor
    target: torch.Tensor | None  # the whole tensor on the device, flat; None: only read and hashed
    start: int  # bytes from the tensor's beginning
    stop: int


@dataclass(slots=True)
class Chunk:
    """Page-locked memory, and when the device has copied what was in it."""

    memory: torch.Tensor  # (bytes,) uint8
    copied: Arrival | None = None


@dataclass(slots=True)
class Reader:
    """One thread's buffers and stream."""

    device: torch.device
    chunk_bytes: int
    check_digest: CheckDigest | None
    chunks: list[Chunk] = field(default_factory=list)
    stream: torch.cuda.Stream | None = None
    next_chunk: int = 0

    def __post_init__(self) -> None:
        pinned = self.device.type == "cuda"
        self.chunks = [Chunk(torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=pinned)) for _ in range(2)]
        if pinned:
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.default_stream(self.device))  # the last swap may still read the target

    def read(self, pieces: "SimpleQueue[Piece]", stop: threading.Event) -> None:
        """Read pieces until there are no more, and wait until the device has all of them."""
        descriptors: dict[Path, int] = {}
        try:
            with ExitStack() as files, torch.no_grad(), torch.cuda.stream(self.stream):  # no stream: it does nothing
                for piece in taken(pieces, stop):
                    file = piece.stored.file
                    if file not in descriptors:
                        descriptors[file] = files.enter_context(open_file(file))
                    self.read_piece(piece, descriptors[file])
                Arrival(self.device).wait()
        except BaseException:
            stop.set()
            raise

    def read_piece(self, piece: Piece, descriptor: int) -> None:
        """Send one piece to the device chunk by chunk. Raises CheckpointError for a wrong digest."""
        digest = None if self.check_digest is None else xxhash.xxh3_64()
        step = piece.stored.chunk_bytes(self.chunk_bytes)
        for start in range(piece.start, piece.stop, step):
            size = min(step, piece.stop - start)
            chunk = self.free_chunk()
            memory = chunk.memory[:size]
            read_exactly(descriptor, bytes_of(memory), piece.stored.offset + start, piece.stored.file)
            if digest is not None:
                digest.update(bytes_of(memory))
            if piece.target is not None:
                send_chunk(memory, piece.stored, piece.target, start)
                chunk.copied = Arrival(self.device)
        if digest is not None and self.check_digest is not None:
            self.check_digest(piece.name, digest.hexdigest())

    def free_chunk(self) -> Chunk:
        """The chunk that was used longest ago, once the device has copied what was in it."""
        chunk = self.chunks[self.next_chunk % len(self.chunks)]
        self.next_chunk += 1
        if chunk.copied is not None:
            chunk.copied.wait()
        return chunk


def taken(pieces: "SimpleQueue[Piece]", stop: threading.Event) -> Iterator[Piece]:
    """Pieces until there are none, or until another thread has failed."""
    while not stop.is_set():
        try:
            yield pieces.get_nowait()
        except Empty:
            return


def send_chunk(memory: torch.Tensor, stored: StoredTensor, target: torch.Tensor, start: int) -> None:
    """Copy the bytes of a tensor from `start` on to their elements of the flat `target`, converted on the device."""
    if stored.encoding is None and DTYPES[stored.dtype] == target.dtype:
        values = stored.values(memory)
    else:
        values = stored.values(memory.to(target.device, non_blocking=True))
    first = stored.index(start)
    target[first : first + len(values)].copy_(values, non_blocking=True)


def read_to_device(
    checkpoint: Checkpoint,
    names: list[str],
    target: Weights,
    check_digest: CheckDigest | None = None,
    threads: int = THREADS,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Copy tensors to their places. With `check_digest` every tensor is hashed, those without a place too.

    Raises CheckpointError, also for values that are not finite; the contents of `target` are undefined then.
    """
    pieces: SimpleQueue[Piece] = SimpleQueue()
    for piece in pieces_of(checkpoint, names, target, chunk_bytes, whole=check_digest is not None):
        pieces.put(piece)
    stop = threading.Event()
    chunk_bytes = max((checkpoint.tensors[name].chunk_bytes(chunk_bytes) for name in names), default=chunk_bytes)
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        readers = [Reader(target.device, chunk_bytes, check_digest) for _ in range(threads)]
        for done in [pool.submit(reader.read, pieces, stop) for reader in readers]:
            done.result()
    check_finite(target, [name for name in names if name in target.layout.places])


def pieces_of(
    checkpoint: Checkpoint, names: list[str], target: Weights, chunk_bytes: int, whole: bool
) -> Iterator[Piece]:
    """The pieces of all tensors, in the order of the file; `whole`: one piece a tensor."""
    for name in names:
        stored = checkpoint.tensors[name]
        place = target.view(name).view(-1) if name in target.layout.places else None
        size = max(1, stored.nbytes) if whole else stored.chunk_bytes(chunk_bytes)
        for start in range(0, stored.nbytes, size):
            yield Piece(name, stored, place, start, min(stored.nbytes, start + size))


def check_finite(weights: Weights, names: list[str]) -> None:
    """Raise CheckpointError for NaN and infinities; waits for the device once for all tensors."""
    views = [weights.view(name) for name in names]
    if not views:
        return
    bounds = torch.stack([torch.stack(view.aminmax()).float() for view in views])  # (names, 2)
    for name, finite in zip(names, bounds.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise CheckpointError(f"tensor {name} holds values that are not finite")


def changed_tensors(live: Weights, staged: Weights, names: list[str]) -> frozenset[str]:
    """The tensors whose bits differ, compared on the device, which is as fast as copying."""
    differ = [(bits(live.view(name)) != bits(staged.view(name))).any() for name in names]
    return frozenset(name for name, is_new in zip(names, torch.stack(differ).tolist(), strict=True) if is_new)


def bits(values: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: NaN equals itself, and 0.0 is not -0.0."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
