"""Long work beside the loop: in a thread of its own, while the steps go on.

Work that would slow a step on the CPU calls `breathe` between its pieces. It then takes turns with the loop: a slice
of time between two steps and nothing during them, so that a step is later by that slice however much there is to do;
after a step that was slower than usual, by less, since slow steps come in groups; before a step that is known to be
long, by nothing. At the same time, the two would fight for the cores, which a step has all use for, for the lock of the
interpreter and for that of the process's memory, and a step would be longer by a multiple of what is done meanwhile.

What waits for a disk or a network, and does not breathe, runs freely. For its sake the interpreter's switch interval
is made short, since a step takes and drops that lock hundreds of times, and the thread has a lower priority. Work on
tensors must itself see to it that it uses one thread (`scheduler_service/weights/update.py`); nothing here loads
torch. It touches nothing that serves, so what goes wrong in it is the command's affair alone.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import TypeVar

from quartet.runtime.errors import CommandRefused

log = logging.getLogger(__name__)

Result = TypeVar("Result")

NICE = 5
SWITCH_INTERVAL_S = 0.0002
SLICE_S = 0.02  # of work in one turn of the loop
SHORTEST_SLICE_S = 0.005  # less is not worth the cold caches
STEP_WEIGHT = 0.1  # of the last step in what is usual
TOLERANCE = 1.15  # times the usual is not slow yet
MOST_SKIPPED = 3  # turns in a row before long steps
PATIENCE_S = 0.06  # of the loop, for a piece of work that outlasts its slice
LONGEST_BREATH_S = 1.0  # the loop may be busy with one long step


class Pace:
    """How long a slice may be: less by what the last step was too slow by, since a slow one is rarely alone."""

    def __init__(self) -> None:
        self._usual_s: float | None = None

    def slice_after(self, step_s: float) -> float:
        """Seconds; may be negative. A slowness that lasts becomes usual."""
        if self._usual_s is None:
            self._usual_s = step_s
        too_slow_s = max(0.0, step_s - TOLERANCE * self._usual_s)
        self._usual_s += STEP_WEIGHT * (step_s - self._usual_s)
        return SLICE_S - too_slow_s


class Turns:
    """When work beside the loop may go on, and how long the loop waits for it.

    `clock`: seconds. `longest_breath_s`: after so long without a turn the work goes on all the same.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, longest_breath_s: float | None = LONGEST_BREATH_S
    ) -> None:
        self._clock = clock
        self._longest_breath_s = longest_breath_s
        self._granted = threading.Event()
        self._resting = threading.Event()
        self._until = clock()
        self._pace = Pace()
        self._granted_at = clock()
        self._skipped = 0

    def grant(self, long_step: bool = False) -> None:
        """One more turn of the loop: where the work rests, let it go on for a slice of time, and wait until it rests.

        Work that does something else than it breathes for (it downloads, or is amid a long piece) is left alone.
        `long_step`: the step that comes is longer than others, so that the work waits for the next, a few times.
        """
        slice_s = self._pace.slice_after(self._clock() - self._granted_at)
        self._skipped = self._skipped + 1 if long_step and self._skipped < MOST_SKIPPED else 0
        if self._resting.is_set() and slice_s >= SHORTEST_SLICE_S and not self._skipped:
            self._resting.clear()
            self._until = self._clock() + slice_s
            self._granted.set()
            self._resting.wait(PATIENCE_S)
        self._granted_at = self._clock()

    def breathe(self) -> None:
        """Go on at once while the slice lasts; else wait for the next."""
        if self._clock() < self._until:
            return
        self._granted.clear()
        self._resting.set()
        if not self._granted.wait(self._longest_breath_s):
            self._resting.clear()

    def end(self) -> None:
        """The work is done: nobody need wait for it."""
        self._resting.set()


_own = threading.local()  # of a thread that works beside the loop: its turns


def breathe() -> None:
    """Between two pieces of work: leave the cores to the steps where this is beside them; else nothing."""
    turns: Turns | None = getattr(_own, "turns", None)
    if turns is not None:
        turns.breathe()


@contextlib.contextmanager
def freely() -> Iterator[None]:
    """Within it nothing waits for a turn: the steps run on another device, and leave the cores alone."""
    turns, _own.turns = getattr(_own, "turns", None), None
    try:
        yield
    finally:
        _own.turns = turns


def beside(work: Callable[[], Result]) -> Generator[None, bool | None, Result]:
    """Start `work` in a thread of its own; yields until it has ended, then returns what it did.

    May be sent, with each turn, whether the next step is longer than others. Raises CommandRefused as the work does,
    and one with status 500 for any other exception.
    """
    done: Future[Result] = Future()
    turns = Turns()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    threading.Thread(target=_run, args=(work, done, turns), name="beside", daemon=True).start()
    long_step: bool | None = False
    while not done.done():
        turns.grant(bool(long_step))
        long_step = yield
    try:
        return done.result()
    except CommandRefused:
        raise
    except Exception as error:
        log.exception("a command failed")
        raise CommandRefused(f"Internal error: {type(error).__name__}: {error}", 500) from error


def _run(work: Callable[[], Result], done: "Future[Result]", turns: Turns) -> None:
    _own.turns = turns
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    try:
        result = work()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)
    finally:
        turns.end()
