"""What one process is told to do with its part of the tier behind the KV pool, and what comes of it.

Where several ranks compute a model, each has a part of every block, in memory and files of its own, and all are told
the same in the same order (`execution/rank_messages.py` sends it).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from quartet.scheduler_service.core.snapshots import NO_SNAPSHOT


@dataclass(frozen=True, slots=True)
class Store:
    """Copy a block out of these pages now: they may hold something else after the next step.

    Or, of a snapshot of recurrent state, the piece of this number.
    """

    key: bytes
    pages: list[int]
    serial: int
    memory: bool
    file: bool
    snapshot: int = NO_SNAPSHOT
    piece: int = 0


@dataclass(frozen=True, slots=True)
class DropMemory:
    """Forget a block of the memory level."""

    key: bytes


@dataclass(frozen=True, slots=True)
class DropFile:
    """Delete a block of the file level."""

    key: bytes


@dataclass(frozen=True, slots=True)
class CarryOut:
    """All of this, in order; the pages may be copied together. Stores to files end in a `Written` each."""

    commands: list[Store | DropMemory | DropFile]


@dataclass(frozen=True, slots=True)
class ReadFiles:
    """Begin to read blocks from files; ends in a `Brought`."""

    number: int
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Put:
    """Fill pages with these blocks, from `skipped` pages behind their beginning on.

    They are what read `number` has brought, or in memory.
    """

    number: int
    keys: list[bytes]
    skipped: int
    pages: list[int]


@dataclass(frozen=True, slots=True)
class PutState:
    """Fill a snapshot with the recurrent state whose pieces these are."""

    number: int
    keys: list[bytes]
    snapshot: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Have a block that a read has brought in memory too."""

    number: int
    key: bytes


@dataclass(frozen=True, slots=True)
class EndRead:
    """Forget what a read has brought."""

    number: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget all blocks of both levels; those from now on are of this identity."""

    identity: bytes


Act = CarryOut | ReadFiles | Put | PutState | Keep | EndRead | Clear


@dataclass(frozen=True, slots=True)
class Written:
    """A block is in its file, or not."""

    key: bytes
    serial: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Brought:
    """The first `good` blocks of a read are there; `damaged` is the one behind them, where not all are."""

    number: int
    good: int
    damaged: bytes | None = None


class TierPart(Protocol):
    """The memory and the files of one process, or those of all ranks together."""

    @property
    def is_there(self) -> bool:
        """Whether the KV pool has its memory."""
        ...

    def do(self, act: Act) -> None:
        """Do what is said; reads and writes of files go on in the background."""
        ...

    def results(self) -> "Iterable[Written | Brought]":
        """What has ended in the background since the last call."""
        ...

    def flush(self) -> None:
        """All that was said so far belongs before the next step."""
        ...
