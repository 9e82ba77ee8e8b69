"""Memory that is released and taken again: the real commands, over a pool that loses its KV."""

from array import array
from collections.abc import Iterable
from random import Random

from quartet.runtime.control import ControlCommand, ReleaseMemory, ResumeMemory
from quartet.runtime.memory_tags import KV_CACHE, NEEDED, TAGS, WEIGHTS
from tests.fakes import UNSEEN
from tests.simulated_ring.disks import Cells

SHARE = 0.35  # of the runs with one rank: their schedulers can release memory
FAILS = 0.05  # the share of tags whose memory is not released, or not to be had


def saves_memory(seed: int) -> bool:
    """Whether the schedulers of a run can release memory."""
    return Random(f"memory {seed}").random() < SHARE


def draw_command(random: Random) -> ControlCommand:
    """What an operator does with memory; taken again is more of it than released."""
    tags = random.choice([None, [KV_CACHE], [WEIGHTS], [KV_CACHE, WEIGHTS]])
    return ReleaseMemory(tags=tags) if random.random() < 0.4 else ResumeMemory(tags=tags)


class VirtualSaver:
    """As MemorySaver has it, with a copy of the weights."""

    must_wait = False

    def __init__(self, cells: Cells, random: Random) -> None:
        self.released: set[str] = set()
        self.fails = 0.0
        self._cells, self._random = cells, random

    @property
    def holds_weights(self) -> bool:
        return WEIGHTS in self.released

    @property
    def holds_kv_cache(self) -> bool:
        return KV_CACHE in self.released

    @property
    def lacks(self) -> list[str]:
        return [tag for tag in NEEDED if tag in self.released]

    def release(self, tags: Iterable[str] | None) -> None:
        for tag in sorted(set(tags or TAGS) - self.released):
            self._may_fail()
            if tag == KV_CACHE:
                for cells, nothing in ((self._cells.tokens, UNSEEN), (self._cells.marks, 0)):
                    cells[:] = array("i", [nothing]) * len(cells)
            self.released.add(tag)

    def resume(self, tags: Iterable[str] | None) -> None:
        for tag in sorted(set(tags or TAGS) & self.released):
            self._may_fail()
            self.released.discard(tag)

    def _may_fail(self) -> None:
        if self._random.random() < self.fails:
            raise MemoryError("no room")
