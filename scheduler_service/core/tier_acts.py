"""What one process is told to do with its part of the tier behind the KV pool, and what comes of it.

Where several ranks compute a model, each has a part of every block, in memory and files of its own, and all are told
the same in the same order. So these are structs, which can be sent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec


class Store(msgspec.Struct, tag=True, frozen=True):
    """Copy a block out of these pages now: they may hold something else after the next step."""

    key: bytes
    pages: list[int]
    serial: int
    memory: bool
    file: bool


class DropMemory(msgspec.Struct, tag=True, frozen=True):
    """Forget a block of the memory level."""

    key: bytes


class DropFile(msgspec.Struct, tag=True, frozen=True):
    """Delete a block of the file level."""

    key: bytes


class CarryOut(msgspec.Struct, tag=True, frozen=True):
    """All of this, in order; the pages may be copied together. Stores to files end in a `Written` each."""

    commands: list[Store | DropMemory | DropFile]


class ReadFiles(msgspec.Struct, tag=True, frozen=True):
    """Begin to read blocks from files; ends in a `Brought`."""

    number: int
    keys: list[bytes]


class Put(msgspec.Struct, tag=True, frozen=True):
    """Fill pages with these blocks, from `skipped` pages behind their beginning on.

    They are what read `number` has brought, or in memory.
    """

    number: int
    keys: list[bytes]
    skipped: int
    pages: list[int]


class Keep(msgspec.Struct, tag=True, frozen=True):
    """Have a block that a read has brought in memory too."""

    number: int
    key: bytes


class EndRead(msgspec.Struct, tag=True, frozen=True):
    """Forget what a read has brought."""

    number: int


class Clear(msgspec.Struct, tag=True, frozen=True):
    """Forget all blocks of both levels; those from now on are of this identity."""

    identity: bytes


Act = CarryOut | ReadFiles | Put | Keep | EndRead | Clear


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
