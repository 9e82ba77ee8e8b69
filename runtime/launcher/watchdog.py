"""Decides whether a service process that does not progress hangs, or is only slow.

A loop that does not move is judged by the clock: `--watchdog-timeout`. A pulse that is missing is no proof: the thread
that beats it needs a core and the interpreter, and so it is silent while other processes have all the cores, while the
memory of the process comes back from a disk, and while C code keeps the interpreter for long. So the kernel is asked
what the threads do (`runtime/process/vitals.py`), and only time counts in which they were stopped or all asleep.
"""

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from quartet.runtime.process.vitals import FROZEN_S, LOOK_EVERY_S, State, Vitals

SILENT_S = 2.0  # without a pulse, which comes once a second: from then on the kernel is asked
# Of one core: who ran or waited for it so much did something. Threads that wait for the interpreter wake up 200 times a
# second to look at it, which takes each 0.2 %.
ACTIVE_SHARE = 0.05


class Sign(Enum):
    """What a process without a pulse did between two samples."""

    MOVED = "moved"  # since the last sample: the count starts again
    SLOW = "slow"  # it would run if it could: this time does not count
    STILL = "still"  # this time counts


def sign(before: Vitals | None, now: Vitals | None, passed_s: float) -> Sign:
    """What a process without a pulse has done between two looks. None: it could not be looked at.

    Without a look before there is nothing to compare, and the state alone decides.
    """
    if now is None:
        return Sign.SLOW
    active_s = now.active_since(before) if before else 0.0
    least_s = 0.0 if now.state is State.STOPPED else ACTIVE_SHARE * passed_s
    if active_s > least_s:
        return Sign.MOVED
    return Sign.SLOW if now.state in (State.RUNNABLE, State.BLOCKED) else Sign.STILL


class StallTimer:
    """How long a count has not changed while it was sampled.

    Time without samples does not count: then the whole server was frozen (a paused container, a suspended machine, a
    snapshot), this process included.
    """

    def __init__(self) -> None:
        self._count = -1
        self._looked_at = 0.0
        self._still_s = 0.0
        self._added_s = 0.0  # at the last look

    def still_s(self, count: int, now: float) -> float:
        """Seconds without a beat, up to now."""
        passed_s, self._looked_at = now - self._looked_at, now
        self._added_s = min(passed_s, 2 * LOOK_EVERY_S)
        self._still_s = self._still_s + self._added_s if count == self._count else 0.0
        self._count = count
        return self._still_s

    def take_back(self) -> float:
        """Subtract the time that the last sample has added."""
        self._still_s = max(0.0, self._still_s - self._added_s)
        return self._still_s

    def restart(self) -> float:
        """Start again from zero: the process has done something else."""
        self._still_s = 0.0
        return 0.0


class Counts(Protocol):
    """A progress word (runtime/process/progress.py)."""

    def beats(self) -> int: ...

    def pulses(self) -> int: ...


class Watchdog:
    """Watches one incarnation of a service, from its Ready line on."""

    def __init__(self, progress: Counts, look: Callable[[], Vitals | None]) -> None:
        """`look`: at its process."""
        self._progress = progress
        self._look = look
        self._steps, self._pulse = StallTimer(), StallTimer()
        self._seen: Vitals | None = None  # since the last pulse
        self._seen_at = 0.0

    def reason_to_replace(self, timeout_s: float, now: float) -> str:
        """Why the service must be replaced, in words; empty while it works. A count that never moved is not judged."""
        beats, pulses = self._progress.beats(), self._progress.pulses()
        frozen_s = min(timeout_s, FROZEN_S)
        stands = self._steps.still_s(beats, now) > timeout_s and beats
        frozen = self._frozen_s(pulses, now) > frozen_s and pulses
        if stands or (frozen and frozen_s == timeout_s):
            return f"has not moved for {timeout_s:.0f} s (--watchdog-timeout)"
        return f"has not moved for {frozen_s:.0f} s (none of its threads runs)" if frozen else ""

    def _frozen_s(self, pulses: int, now: float) -> float:
        """Seconds without a pulse, but for those in which the process would have run if it could."""
        silent_s = self._pulse.still_s(pulses, now)
        if not silent_s:
            self._seen = None
        if silent_s <= SILENT_S and self._seen is None:
            return silent_s
        before, passed_s = self._seen, now - self._seen_at
        self._seen, self._seen_at = self._look(), now
        match sign(before, self._seen, passed_s):
            case Sign.MOVED:
                return self._pulse.restart()
            case Sign.SLOW:
                return self._pulse.take_back()
            case Sign.STILL:
                return silent_s
