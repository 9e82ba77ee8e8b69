"""One process's part of the tier behind the KV pool: its blocks in host memory and in files.

Copies between the pool and host memory are made at once, so between two steps; files are read and written in the
threads of `BlockIO`. It decides nothing: see `core/tier_acts.py`.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.core.snapshots import NO_SNAPSHOT
from quartet.scheduler_service.core.tier_acts import (
    Act,
    Brought,
    CarryOut,
    Clear,
    DropFile,
    DropMemory,
    EndRead,
    Keep,
    Put,
    PutState,
    ReadFiles,
    Store,
    Written,
)
from quartet.scheduler_service.execution.kv_blocks import KvBlocks, MemoryBlocks
from quartet.scheduler_service.execution.rank_messages import OpenTier
from quartet.scheduler_service.host import block_io
from quartet.scheduler_service.host.block_files import NOT_USABLE, BlockFiles, drop_former_ranks
from quartet.scheduler_service.host.block_io import BlockIO
from quartet.scheduler_service.host.transfer import Arrival, fetch
from quartet.scheduler_service.weights.inspection import Inspection
from quartet.scheduler_service.weights.parameters import Weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Copy:
    """A block that was copied out of the pool."""

    row: torch.Tensor  # (bytes,) uint8, on the device
    host: torch.Tensor  # the same on the host, once `arrival` was waited for; for files only
    arrival: Arrival


class OwnPart:
    """Memory and files of this process."""

    def __init__(self, blocks: KvBlocks, memory_blocks: int, most_copied: int, files: BlockFiles | None) -> None:
        """`most_copied`: blocks that are copied out of the pool at once."""
        self._blocks = blocks
        self._most_copied = most_copied
        self._memory = MemoryBlocks(memory_blocks, blocks.block_bytes, blocks.device)
        self._files = files
        self._io: BlockIO | None = None
        self._brought: dict[int, dict[bytes, torch.Tensor]] = {}  # by read; its blocks in memory of the host

    def open(self, identity: bytes) -> list[bytes]:
        """Begin with blocks of this identity; returns those whose files are there, least recently used first.

        Raises OSError.
        """
        if self._files is None:
            return []
        known = self._files.begin(identity)
        self._io = BlockIO(self._files)
        return known

    @property
    def is_there(self) -> bool:
        """See TierPart.is_there."""
        return self._blocks.is_there

    def do(self, act: Act) -> None:
        """See TierPart.do."""
        match act:
            case CarryOut(commands):
                self._carry_out(commands)
            case ReadFiles(number, keys):
                assert self._io is not None
                self._io.read(number, keys)
            case Put(number, keys, skipped, pages):
                self._blocks.scatter(self._rows(number, keys), skipped, pages)
            case PutState(number, keys, snapshot):
                self._blocks.scatter_state(self._rows(number, keys), snapshot)
            case Keep(number, key):
                self._memory.put(key, self._brought[number][key])
            case EndRead(number):
                self._brought.pop(number, None)
            case Clear(identity):
                self._memory.clear()
                if self._io:
                    self._io.forget(identity)

    def results(self) -> Iterator[Written | Brought]:
        """See TierPart.results."""
        for result in self._io.results() if self._io else ():
            if isinstance(result, block_io.Written):
                yield Written(result.key, result.serial, result.ok)
                continue
            if result.damaged is not None:
                log.warning("A block of KV is damaged or gone; it will be computed again.")
            size = self._blocks.block_bytes
            rows = torch.frombuffer(result.data, dtype=torch.uint8).view(-1, size) if result.good else ()
            self._brought[result.number] = dict(zip(result.good, rows, strict=False))
            yield Brought(result.number, len(result.good), result.damaged)

    def flush(self) -> None:
        """Nothing waits."""

    def _rows(self, number: int, keys: list[bytes]) -> torch.Tensor:
        """Blocks, or pieces of a state, that a read has brought or that are in memory."""
        brought = self._brought.get(number, {})
        return torch.stack([brought[key] if key in brought else self._memory.get(key) for key in keys])

    def _carry_out(self, commands: list[Store | DropMemory | DropFile]) -> None:
        copies = self._copies([command for command in commands if isinstance(command, Store)])
        for command in commands:
            match command:
                case Store():
                    self._store(command, next(copies))
                case DropMemory(key):
                    self._memory.drop(key)
                case DropFile(key) if self._io:
                    self._io.delete(key)

    def _copies(self, stores: list[Store]) -> Iterator[Copy]:
        """A copy of each block's pages, made some blocks at a time."""
        for some, rows in self._gathered(stores):
            host = fetch(rows) if any(store.file for store in some) else rows
            arrival = Arrival(self._blocks.device)
            yield from (Copy(*pair, arrival) for pair in zip(rows, host, strict=True))

    def _gathered(self, stores: list[Store]) -> Iterator[tuple[list[Store], torch.Tensor]]:
        """Some stores in order, and the row of each on the device."""
        for snapshot, run in itertools.groupby(stores, lambda store: store.snapshot):
            together = list(run)
            if snapshot != NO_SNAPSHOT:
                yield together, self._blocks.gather_state(snapshot)[[store.piece for store in together]]
                continue
            for start in range(0, len(together), self._most_copied):
                some = together[start : start + self._most_copied]
                yield some, self._blocks.gather([page for store in some for page in store.pages])

    def _store(self, command: Store, copy: Copy) -> None:
        if command.memory:
            self._memory.put(command.key, copy.row)
        if command.file and self._io:
            self._io.write(command.key, command.serial, copy.host.numpy().data, copy.arrival.wait)


def own_part(opening: OpenTier, blocks: KvBlocks, rank: int = 0, leads_machine: bool = True) -> OwnPart:
    """The part of one rank. Raises StartupError where its directory cannot be used.

    `leads_machine`: it is the first rank of its machine, and deletes what ranks that are no more have left there.
    """
    files = None
    if opening.directory is not None:
        directory = Path(opening.directory)
        files = BlockFiles(directory / f"rank{rank}" if rank else directory, blocks.block_bytes)
        if leads_machine:
            drop = partial(drop_former_ranks, directory) if rank else files.drop_ranks
            drop_ranks(drop, opening.ranks, directory)
    return OwnPart(blocks, opening.memory_blocks, opening.most_copied, files)


def drop_ranks(drop: Callable[[int], None], first: int, directory: Path) -> None:
    """See BlockFiles.drop_ranks. Raises StartupError."""
    try:
        drop(first)
    except OSError as error:
        raise StartupError(NOT_USABLE.format(directory, error.strerror)) from error


def facts_of(weights: Weights, blocks: KvBlocks) -> str:
    """What the KV of one rank follows from: a hash of the values of its weights, and the layout."""
    inspection = Inspection(weights)
    return f"{inspection.checksums(inspection.names(None))[1]} {blocks.layout}"
