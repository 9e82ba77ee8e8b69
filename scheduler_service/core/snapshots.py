"""Snapshots of recurrent state: which of them are free, which node of the prefix tree has which, who reads them.

A model with recurrent layers cannot go on from cached keys and values alone: it needs the state behind the last token
of the prefix. A snapshot is such a state, at a border between two pages. Knows numbers only; the worker has the memory.

    free ──take──► reserved by a launched slice ──attach──► held by a node ──evicted, dropped──► free
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

NO_SNAPSHOT = -1


@dataclass(frozen=True, slots=True)
class SnapshotOptions:
    """What a model with recurrent layers has for its prefix cache."""

    count: int  # snapshots that there is memory for
    interval: int  # tokens between two snapshots of a long sequence; whole pages


class Holder(Protocol):
    """A node of the prefix tree. Its snapshot is the state behind its last page."""

    snapshot: int


class Snapshots:
    """Gives snapshots to slices and nodes. The least recently used one is taken from its node when none is free."""

    def __init__(self, count: int) -> None:
        self.total = count
        self._free = list(range(count - 1, -1, -1))
        self._reserved: set[int] = set()
        self._holders: dict[int, Holder] = {}  # in order of last use
        self._readers: dict[int, int] = {}  # launched slices that begin with a snapshot: it must stay as it is

    @property
    def held(self) -> int:
        """How many the prefix tree holds."""
        return len(self._holders)

    def take(self) -> int | None:
        """Reserve a snapshot; None where every one is reserved or read."""
        if not self._free:
            evictable = next((number for number in self._holders if number not in self._readers), None)
            if evictable is None:
                return None
            self.drop(self._holders[evictable])
        number = self._free.pop()
        self._reserved.add(number)
        return number

    def give(self, number: int) -> None:
        """A reserved snapshot comes back: its state was not computed, or nobody needs it."""
        self._reserved.remove(number)
        self._free.append(number)

    def attach(self, number: int, node: Holder) -> None:
        """A reserved snapshot holds the state of this node from now on; the node keeps one that it has already."""
        if node.snapshot != NO_SNAPSHOT:
            self.give(number)
            return
        self._reserved.remove(number)
        self._holders[number] = node
        node.snapshot = number

    def drop(self, node: Holder) -> None:
        """The node loses its snapshot."""
        assert node.snapshot not in self._readers, node.snapshot
        del self._holders[node.snapshot]
        self._free.append(node.snapshot)
        node.snapshot = NO_SNAPSHOT

    def begin_reading(self, number: int) -> None:
        """A slice will begin with this snapshot: keep it until `end_reading`."""
        self._holders[number] = self._holders.pop(number)
        self._readers[number] = self._readers.get(number, 0) + 1

    def end_reading(self, number: int) -> None:
        self._readers[number] -= 1
        if not self._readers[number]:
            del self._readers[number]

    def imbalance(self) -> str:
        """While no slice is launched: why the counts do not add up, or ""."""
        if len(self._free) + self.held == self.total and not (self._reserved or self._readers):
            return ""
        return f"snapshots: free {len(self._free)} + held {self.held} of {self.total}, {len(self._readers)} read"

    def check_invariants(self, nodes: Iterable[Holder]) -> None:
        """Assert that every snapshot is in one place. `nodes`: all of the tree."""
        held = {node.snapshot: node for node in nodes if node.snapshot != NO_SNAPSHOT}
        assert held == self._holders, (held.keys(), self._holders.keys())
        counts = (len(self._free), len(self._reserved), len(held), self.total)
        assert sum(counts[:3]) == self.total, counts
        assert len({*self._free, *self._reserved, *held}) == self.total, counts
        assert self._readers.keys() <= held.keys(), (self._readers, held.keys())


def borders(start: int, end: int, wanted: Iterable[int], interval: int) -> list[int]:
    """The positions in (start, end] to save the state at: those wanted, then multiples of the interval, last first."""
    first = [position for position in dict.fromkeys(wanted) if start < position <= end]
    regular = range(end - end % interval, start, -interval)
    return list(dict.fromkeys([*first, *regular]))
