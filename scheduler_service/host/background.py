"""Long work in a background thread, while the scheduler's loop goes on with its steps.

Work that would slow a step on the CPU calls `yield_point` between its pieces. It is then throttled: it runs for a
slice of time between two steps and not during them, so a step starts later by that slice, however much work there is.
After a step that was slower than usual the slice is shorter, because slow steps come in groups; before a step that is
known to be long there is none. Unthrottled, work and steps would compete for the cores (a step uses all of them), for
the interpreter's lock and for the lock of the process's memory map, and steps would take several times as long.

Work that waits for a disk or a network, and calls no `yield_point`, runs all the time. For its sake the interpreter's
switch interval is short, since a step takes and drops that lock hundreds of times, and the thread has a lower
priority. Work on tensors must itself limit torch to one thread (`weights/staging.on_one_thread`); nothing here loads
torch. The work touches nothing that serves, so its errors concern its own command only.
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import TypeVar

from quartet.runtime.errors import CommandRefused
from quartet.runtime.process.priority import give_way

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SWITCH_INTERVAL_S = 0.0002
SLICE_S = 0.02  # of work in one turn of the loop
READING_SLICE_S = 0.01  # of the reading of an adapter, which takes a tenth of a second: no stream need notice
SHORTEST_SLICE_S = 0.005  # a shorter one is not worth the cold caches
STEP_WEIGHT = 0.1  # of the last step in the moving average of steps
SLOW_FACTOR = 1.15  # a step is slow from this multiple of the average on
MAX_SKIPPED = 3  # slices in a row that long steps may cost
MAX_OVERRUN_S = 0.06  # how long the loop waits for a piece of work that outlasts its slice
LIFT_AGAIN_S = 0.01  # while the loop waits for work: others may have come before it
MAX_WAIT_S = 1.0  # of the work for a slice: the loop may be busy with one long step


class SliceLength:
    """How long a slice may be: shorter by the excess of the last step over the average of steps."""

    def __init__(self, longest_s: float = SLICE_S) -> None:
        self._longest_s = longest_s
        self._average_s: float | None = None

    def after_step(self, step_s: float) -> float:
        """Seconds; may be negative. Steps that stay slow become the average."""
        if self._average_s is None:
            self._average_s = step_s
        excess_s = max(0.0, step_s - SLOW_FACTOR * self._average_s)
        self._average_s += STEP_WEIGHT * (step_s - self._average_s)
        return self._longest_s - excess_s


class CooperativeThrottle:
    """Lets background work run in slices between steps. The loop calls `grant`, the work calls `yield_point`.

    The loop lifts it where there are no steps for a while, or no more slices: the work goes on then, up to the next
    slice that it is granted.

    `clock`: seconds. `max_wait_s`: after so long without a slice the work goes on all the same; None: never. `slice_s`:
    the longest slice.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        max_wait_s: float | None = MAX_WAIT_S,
        slice_s: float = SLICE_S,
    ) -> None:
        self._clock = clock
        self._max_wait_s = max_wait_s
        self._granted = threading.Event()
        self._work_waits = threading.Event()
        self._slice_ends_at = clock()
        self._length = SliceLength(slice_s)
        self._granted_at = clock()
        self._skipped = 0
        self._lifted = False

    def grant(self, long_step: bool = False) -> None:
        """Once per turn of the loop: if the work waits at a yield point, let it run for a slice, until it waits again.

        Work that is elsewhere (it downloads, or is amid a long piece) is not waited for.
        `long_step`: the next step is longer than others, so the work gets no slice now, a few times in a row at most.
        """
        self._lifted = False
        slice_s = self._length.after_step(self._clock() - self._granted_at)
        self._skipped = self._skipped + 1 if long_step and self._skipped < MAX_SKIPPED else 0
        if self._work_waits.is_set() and slice_s >= SHORTEST_SLICE_S and not self._skipped:
            self._work_waits.clear()
            self._slice_ends_at = self._clock() + slice_s
            self._granted.set()
            self._work_waits.wait(MAX_OVERRUN_S)
        self._granted_at = self._clock()

    def yield_point(self) -> None:
        """Return at once while the slice lasts; else wait for the next one."""
        if self._lifted or self._clock() < self._slice_ends_at:
            return
        self._granted.clear()
        self._work_waits.set()
        if self._lifted or not self._granted.wait(self._max_wait_s):  # it may have been lifted since the first look
            self._work_waits.clear()

    def lift(self) -> None:
        """Let the work go on until the next `grant`."""
        self._lifted = True
        self._work_waits.clear()
        self._granted.set()

    def finish(self) -> None:
        """The work is done: the loop need not wait for it."""
        self._work_waits.set()


_thread = threading.local()  # `throttle`: of the work that runs in this thread


def yield_point() -> None:
    """Between two pieces of background work: wait while a step runs. In other threads it does nothing."""
    if (throttle := own_throttle()) is not None:
        throttle.yield_point()


def own_throttle() -> CooperativeThrottle | None:
    """That of the work which runs in this thread; None in the loop's."""
    return getattr(_thread, "throttle", None)


class Turn:
    """A lock for work in the background, for which the loop may wait too: what has it is not throttled meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._throttle: CooperativeThrottle | None = None  # of the work that has it

    @property
    def taken(self) -> bool:
        """Whether some thread has it."""
        return self._lock.locked()

    def take(self, wait: bool = True) -> bool:
        """Take it, if need be after others; whether it was taken."""
        own = own_throttle()
        if not self._lock.acquire(blocking=wait and own is not None):
            if not wait:
                return False
            while not self._lock.acquire(timeout=LIFT_AGAIN_S):
                if (throttle := self._throttle) is not None:
                    throttle.lift()
        self._throttle = own
        return True

    def leave(self) -> None:
        """Leave it to the next."""
        self._throttle = None
        self._lock.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *error: object) -> None:
        self.leave()


@contextlib.contextmanager
def unthrottled() -> Iterator[None]:
    """Within it `yield_point` does nothing: for work beside steps that run on another device than the CPU."""
    throttle, _thread.throttle = own_throttle(), None
    try:
        yield
    finally:
        _thread.throttle = throttle


def run_in_background(work: Callable[[], Result], slice_s: float = SLICE_S) -> Generator[None, bool | None, Result]:
    """Run `work` in a thread of its own; yields once per turn of the loop until it has ended, then returns its result.

    The loop may send in whether its next step is longer than others. Raises the work's CommandRefused, and one with
    status 500 for any other exception. Work whose generator is closed goes on: nobody grants it slices any more.
    """
    done: Future[Result] = Future()
    throttle = CooperativeThrottle(slice_s=slice_s)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    threading.Thread(target=_run, args=(work, done, throttle), name="background", daemon=True).start()
    long_step: bool | None = False
    try:
        while not done.done():
            throttle.grant(bool(long_step))
            long_step = yield
    finally:
        throttle.lift()
    try:
        return done.result()
    except CommandRefused:
        raise
    except Exception as error:
        log.exception("a command failed")
        raise CommandRefused(f"Internal error: {type(error).__name__}: {error}", 500) from error


def _run(work: Callable[[], Result], done: "Future[Result]", throttle: CooperativeThrottle) -> None:
    _thread.throttle = throttle
    give_way()
    try:
        result = work()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)
    finally:
        throttle.finish()
