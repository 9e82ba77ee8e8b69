"""KV beyond the pool, without tensors and files: what a part is told is done in virtual time, late and badly at times.

A cell of the pool is a token and the weights that have computed it. Every cell that is kept or brought back must be of
the weights that serve: else the tier would mix KV of two versions.
"""

import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from quartet.scheduler_service.core.block_keys import digest
from quartet.scheduler_service.core.kv_tier import TierSizes
from quartet.scheduler_service.core.snapshots import NO_SNAPSHOT, SnapshotOptions
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
from quartet.scheduler_service.execution.kv_tier import FETCH_S, FETCH_S_PER_TOKEN
from tests.simulated_ring.clock import Agenda

BLOCK_TOKENS = 4
SHARE = 0.45  # of the runs: they have a tier
RECURRENT = 0.3  # of the runs: the model has recurrent layers
STATE_PIECES = 2

Content = tuple["array[int]", "array[int]"]  # tokens of a block, and the weights that have computed them


@dataclass(frozen=True)
class Pace:
    """How a disk behaves."""

    job_s: float  # of a write or a deletion, at most
    read_s: float  # of a read, at most
    hangs: float  # the share of reads that take far too long
    fails: float  # the share of writes that fail
    damaged: float  # the share of blocks that cannot be read


PACES = (
    Pace(0.001, 0.002, 0.0, 0.0, 0.0),
    Pace(0.003, 0.02, 0.02, 0.02, 0.02),
    Pace(0.05, 0.4, 0.1, 0.1, 0.1),
)
HANG_S = 3.0


@dataclass(frozen=True)
class TierSettings:
    """The tier of all schedulers of a run."""

    sizes: TierSizes
    pace: Pace


def tier_of(seed: int, recurrent: bool = False) -> TierSettings | None:
    """Whether a run has a tier, and which. `recurrent`: the states of its model are kept too."""
    random = Random(f"tier {seed}")
    if random.random() >= SHARE:
        return None
    memory, files = random.choice([(0, 100), (0, 8), (6, 100), (30, 8), (6, 0), (30, 0)])
    sizes = TierSizes(
        BLOCK_TOKENS,
        1,
        memory,
        files,
        random.choice([2, 100]),
        random.choice([1, 2, 100]),
        STATE_PIECES if recurrent else 0,
    )
    return TierSettings(sizes, random.choice(PACES))


def snapshots_of(seed: int) -> SnapshotOptions | None:
    """What the prefix cache of a model with recurrent layers has, in some of the runs."""
    random = Random(f"recurrent {seed}")
    return SnapshotOptions(random.choice([1, 5, 60]), 8) if random.random() < RECURRENT else None


@dataclass
class BlockDisk:
    """What outlasts a process: the blocks of one identity."""

    identity: bytes = b""
    blocks: dict[bytes, Content] = field(default_factory=dict)

    def begin(self, identity: bytes) -> list[bytes]:
        """See BlockFiles.begin."""
        if identity != self.identity:
            self.clear(identity)
        return list(self.blocks)

    def clear(self, identity: bytes) -> None:
        self.blocks.clear()
        self.identity = identity


def mark_of(weight_version: str) -> int:
    """What a cell says of the weights."""
    return zlib.crc32(weight_version.encode()) >> 1


def identity_of(weight_version: str) -> bytes:
    return digest(weight_version.encode())


class Cells:
    """The pool of one process."""

    def __init__(self, page_size: int, tokens: "array[int]") -> None:
        self.page_size, self.tokens = page_size, tokens
        self.marks = array("i", bytes(4 * len(tokens)))
        self.snapshots: dict[int, array[int]] = {}  # recurrent states: the tokens that they have seen
        self.snapshot_marks: dict[int, int] = {}

    def piece(self, snapshot: int, number: int) -> Content:
        """A part of a recurrent state, and the weights that have computed it."""
        state = self.snapshots[snapshot]
        half = len(state) // STATE_PIECES
        tokens = state[half:] if number else state[:half]
        return tokens, array("i", [self.snapshot_marks[snapshot]]) * len(tokens)

    def content(self, pages: list[int]) -> Content:
        tokens, marks = array("i"), array("i")
        for page in pages:
            begin, end = page * self.page_size, (page + 1) * self.page_size
            tokens += self.tokens[begin:end]
            marks += self.marks[begin:end]
        return tokens, marks

    def put(self, content: Content, pages: list[int]) -> None:
        size = self.page_size
        for place, page in enumerate(pages):
            for own, new in zip((self.tokens, self.marks), content, strict=True):
                own[page * size : (page + 1) * size] = new[place * size : (place + 1) * size]


class Saver(Protocol):
    """What releases memory."""

    @property
    def holds_kv_cache(self) -> bool: ...


class VirtualPart:
    """As `execution.tier_part.OwnPart` has it."""

    def __init__(
        self,
        cells: Cells,
        disk: BlockDisk,
        pace: Pace,
        agenda: Agenda,
        random: Random,
        serves: Callable[[], str],
    ) -> None:
        """`serves`: the weights that serve now."""
        self.cells, self.disk, self.pace = cells, disk, pace
        self.memory: dict[bytes, Content] = {}
        self.brought: dict[int, dict[bytes, Content]] = {}
        self.ready: list[Written | Brought] = []
        self.dead = False  # its process has ended
        self._agenda, self._random, self._serves = agenda, random, serves
        self.suffixes: tuple[str, ...] = ("",)  # what adapters may add to the label of the weights
        self.saver: Saver | None = None  # of the pool's memory; None: it is always there
        self._jobs: deque[Callable[[], None]] = deque()  # of the writer, in order

    @property
    def is_there(self) -> bool:
        return self.saver is None or not self.saver.holds_kv_cache

    @property
    def busy(self) -> bool:
        """Whether the writer has something to do."""
        return bool(self._jobs)

    def open(self, identity: bytes) -> list[bytes]:
        return self.disk.begin(identity)

    def do(self, act: Act) -> None:
        match act:
            case CarryOut(commands):
                for command in commands:
                    self._carry_out(command)
            case ReadFiles(number, keys):
                hangs = self._random.random() < self.pace.hangs
                delay = HANG_S if hangs else self._random.uniform(0, self.pace.read_s)
                self._agenda.after(delay, lambda: self._read(number, keys))
                patience = FETCH_S + len(keys) * BLOCK_TOKENS * FETCH_S_PER_TOKEN
                self._agenda.after(patience, lambda: None)  # the loop looks then
            case Put(number, keys, skipped, pages):
                tokens, marks = self._together(number, keys)
                begin = skipped * self.cells.page_size
                self.cells.put((tokens[begin:], marks[begin:]), pages)
            case PutState(number, keys, snapshot):
                self.cells.snapshots[snapshot], marks = self._together(number, keys)
                self.cells.snapshot_marks[snapshot] = marks[0]
            case Keep(number, key):
                self.memory[key] = self.brought[number][key]
            case EndRead(number):
                self.brought.pop(number, None)
            case Clear(identity):
                self.memory.clear()
                self._later(lambda: self.disk.clear(identity))

    def results(self) -> "Iterator[Written | Brought]":
        while self.ready:
            yield self.ready.pop(0)

    def flush(self) -> None:
        """Nothing waits."""

    def _together(self, number: int, keys: list[bytes]) -> Content:
        brought = self.brought.get(number, {})
        tokens, marks = array("i"), array("i")
        for key in keys:
            block = brought[key] if key in brought else self.memory[key]
            self._check(block, "comes back")
            assert len(set(block[1])) == 1, "KV of two adapters comes back"
            tokens += block[0]
            marks += block[1]
        return tokens, marks

    def _carry_out(self, command: Store | DropMemory | DropFile) -> None:
        match command:
            case Store():
                content = self.cells.content(command.pages)
                if command.snapshot != NO_SNAPSHOT:
                    content = self.cells.piece(command.snapshot, command.piece)
                self._check(content, "is kept")
                if command.memory:
                    self.memory[command.key] = content
                if command.file:
                    self._later(lambda: self._write(command, content))
            case DropMemory(key):
                self.memory.pop(key, None)
            case DropFile(key):
                self._later(lambda: self.disk.blocks.pop(key, None))

    def _check(self, content: Content, what: str) -> None:
        right = {mark_of(self._serves() + suffix) for suffix in self.suffixes}
        assert right.issuperset(content[1]), f"KV of other weights {what}"

    def _later(self, job: Callable[[], object]) -> None:
        self._jobs.append(lambda: void(job()))
        if len(self._jobs) == 1:
            self._wait()

    def _wait(self) -> None:
        self._agenda.after(self._random.uniform(0, self.pace.job_s), self._work)

    def _work(self) -> None:
        if self.dead:
            return
        self._jobs[0]()
        self._jobs.popleft()
        if self._jobs:
            self._wait()

    def _write(self, command: Store, content: Content) -> None:
        ok = self._random.random() >= self.pace.fails
        if ok:
            self.disk.blocks[command.key] = content
        self.ready.append(Written(command.key, command.serial, ok))

    def _read(self, number: int, keys: list[bytes]) -> None:
        if self.dead:
            return
        found: dict[bytes, Content] = {}
        for key in keys:
            if key not in self.disk.blocks or self._random.random() < self.pace.damaged:
                break
            found[key] = self.disk.blocks[key]
        self.brought[number] = found
        good = len(found)
        self.ready.append(Brought(number, good, keys[good] if good < len(keys) else None))


def void(_: object) -> None:
    """For a function that returns nothing."""
