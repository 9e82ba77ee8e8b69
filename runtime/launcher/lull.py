"""A moment when processes have little to do, for work that can wait but not for ever."""

from collections.abc import Sequence

from quartet.runtime.process.vitals import Vitals, read_vitals

LOOK_EVERY_S = 1.0
BUSY = 0.5  # cores that processes use, or wait for: more is work, less is housekeeping


class Lull:
    """Waits for an interval in which processes use less than half of a core, or for a time limit."""

    def __init__(self, latest: float) -> None:
        """`latest`: from this time of the monotonic clock on any moment is good."""
        self._latest = latest
        self._looked_at = 0.0
        self._before: dict[int, Vitals] = {}  # by process

    def is_here(self, now: float, pids: Sequence[int]) -> bool:
        """Whether now is the moment, as seen since the last look; the first one only begins to look."""
        looked_at, before = self._looked_at, self._before
        found = {pid: vitals for pid in pids if (vitals := read_vitals(pid)) is not None}
        self._looked_at, self._before = now, found
        used_s = sum(vitals.active_since(before[pid]) for pid, vitals in found.items() if pid in before)
        return now >= self._latest or (bool(looked_at) and used_s < BUSY * (now - looked_at))
