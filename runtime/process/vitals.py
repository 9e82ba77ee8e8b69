"""What the kernel tells of the threads of a process: their states, and what they have had of the cores.

It is known without the process's help, so also of one that does not run.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

FROZEN_S = 10.0  # so long a process may be stopped, or asleep without a sign of life
LOOK_EVERY_S = 0.5  # at processes that should move
OWN_WAYS = "ZMQbg/"  # begins the names of threads that never run Python: they move though all others stand still


class State(IntEnum):
    """Of a process; where its threads differ, the greatest of theirs."""

    ASLEEP = 0  # every thread waits for an event
    BLOCKED = 1  # in the kernel, for a disk or for memory
    RUNNABLE = 2  # it runs, or waits for a core
    STOPPED = 3  # by a signal or a debugger


LETTERS = {"R": State.RUNNABLE, "D": State.BLOCKED, "T": State.STOPPED, "t": State.STOPPED}


@dataclass(frozen=True)
class Vitals:
    """One look at a process."""

    state: State
    active_s: Mapping[int, float]  # by thread: how long it has run or waited for a core, since it began

    def active_since(self, before: "Vitals") -> float:
        """Seconds that threads have run or waited for a core between two looks, in sum."""
        return sum(seconds - before.active_s.get(thread, 0.0) for thread, seconds in self.active_s.items())


def read_vitals(pid: int, root: Path = Path("/proc")) -> Vitals | None:
    """The threads that may run Python; None where the kernel does not tell, or the process has ended."""
    threads = list(_threads(root / str(pid) / "task"))
    if not threads:
        return None
    return Vitals(max(state for _, state, _ in threads), {thread: active_s for thread, _, active_s in threads})


class StopTimer:
    """How long a process was stopped without a break. For one that shows no signs of life, because it starts.

    Time in which nobody looked does not count: then the whole server was frozen, this process included.
    """

    def __init__(self, look: Callable[[], Vitals | None]) -> None:
        """`look`: at its process."""
        self._look = look
        self._was_stopped = False
        self._looked_at = 0.0
        self._stopped_s = 0.0

    def stopped_s(self, now: float) -> float:
        """Seconds, up to now; call it every LOOK_EVERY_S."""
        found = self._look()
        is_stopped = found is not None and found.state is State.STOPPED
        passed_s, self._looked_at = min(now - self._looked_at, 2 * LOOK_EVERY_S), now
        self._stopped_s = self._stopped_s + passed_s if is_stopped and self._was_stopped else 0.0
        self._was_stopped = is_stopped
        return self._stopped_s

    def reason_to_replace(self, timeout_s: float, now: float) -> str:
        """Why the process must be replaced, in words; empty while it may go on. `timeout_s`: --watchdog-timeout."""
        limit_s = min(timeout_s, FROZEN_S)
        return f"was stopped for {limit_s:.0f} s while it started" if self.stopped_s(now) > limit_s else ""


def _threads(directory: Path) -> Iterator[tuple[int, State, float]]:
    """Each thread's id, state and time of activity."""
    try:
        found = list(directory.iterdir())
    except OSError:
        return
    for thread in found:
        try:
            name, fields = fields_of(thread)
            ran_ns, waited_ns, _ = map(int, (thread / "schedstat").read_text().split())
        except (OSError, ValueError):  # it has ended meanwhile, or this kernel does not count
            continue
        if not name.startswith(OWN_WAYS):
            yield int(thread.name), LETTERS.get(fields[0], State.ASLEEP), (ran_ns + waited_ns) / 1e9


def fields_of(directory: Path) -> tuple[str, list[str]]:
    """Name of a process or thread, and the fields behind it: state, parent, ... The name may hold spaces and brackets.

    Raises OSError when it has ended.
    """
    head, _, rest = (directory / "stat").read_text().rpartition(")")
    return head.partition("(")[2], rest.split()
