"""Which tokens the grammars of a step allow.

Masks that take long are begun before the forward pass and computed at the same time, in a thread that needs no
interpreter while it does so; the draw finds them ready. Others are computed at once: a thread takes turns with the one
that prepares the step, and on a few cores it takes from the forward pass more than it saves. Where the last step's
tokens are still on a device, the masks are computed once those are here, and the device computes meanwhile.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import numpy as np

from quartet.scheduler_service.grammar.matchers import (
    Bitmask,
    Constrained,
    MaskFiller,
    Matcher,
    bitmask_words,
)

ALL_ALLOWED = -1  # 32 set bits
NONE_ALLOWED = 0
THREADS = 2
LEAST_CORES = 4  # for them: with two, 64 rows took longer on two threads than one after the other
THREAD_FROM_S = 0.001  # of work; less is not worth what the two threads take from each other
LAST_WEIGHT = 0.25  # of the last measured step in the moving average of the time for a row
MEASURED_EVERY = 4  # steps whose masks are computed at once: the clock of a thread's own time asks the kernel


MakeRoom = Callable[[int, int], Bitmask]  # of so many rows and words, with anything in it


def plain_room(rows: int, words: int) -> Bitmask:
    return np.empty((rows, words), np.int32)


class Begun(Protocol):
    """Masks on their way: see Masks.start."""

    def result(self, timeout: float | None = None) -> Bitmask:
        """Wait for them. They are overwritten by later ones: see Masks."""
        ...


class Ready(NamedTuple):
    """Masks that were computed at once."""

    bitmask: Bitmask

    def result(self, timeout: float | None = None) -> Bitmask:
        return self.bitmask


class Room:
    """Memory for masks. It stays: fresh memory in each step takes page faults, and its address as long as a mask."""

    def __init__(self, words: int) -> None:
        self.words = words
        self.bitmask: Bitmask = np.empty((0, words), np.int32)
        self.address = 0
        self._rows = self.bitmask  # as given last

    def rows(self, count: int, make: MakeRoom) -> Bitmask:
        """The first rows of it, which is made anew where it is too small; the same object for the same count."""
        if count != len(self._rows):
            if count > len(self.bitmask):
                self.bitmask = make(count, self.words)
                self.address = self.bitmask.ctypes.data
            self._rows = self.bitmask[:count]
        return self._rows


class Masks:
    """Makes the bit masks of constrained rows.

    They are overwritten by the masks that are begun next, with several `rooms` by those behind so many.
    """

    def __init__(
        self, vocab_size: int, threaded: bool | None = None, rooms: int = 1, make_room: MakeRoom = plain_room
    ) -> None:
        """`threaded`: whether they have a thread of their own; by default where there is a second core."""
        self._rooms = [Room(bitmask_words(vocab_size)) for _ in range(rooms)]  # the first one is the next
        self._make_room = make_room
        cores = len(os.sched_getaffinity(0))
        self._filler = MaskFiller(THREADS if cores >= LEAST_CORES else 1)
        threaded = cores > 1 if threaded is None else threaded
        self._thread = ThreadPoolExecutor(1, "masks") if threaded else None
        self._begun: Future[Bitmask] | None = None  # in the thread
        self._row_s = THREAD_FROM_S  # the time for a row, as it was lately
        self._unmeasured = MEASURED_EVERY  # steps since it was measured

    def start(
        self, requests: Sequence[tuple[Matcher | None, tuple[int, ...]]], *, awaited: bool = False
    ) -> Begun | None:
        """Begin the masks of a step's rows: for each request, one, and one more behind each of its drafts.

        None where no request is constrained. Until the result is there, nobody else may use the matchers. `awaited`:
        nothing is done before the result is asked for.
        """
        constrained, rows = [], 0
        for matcher, drafts in requests:
            if matcher is not None:
                constrained.append(Constrained(matcher, rows, drafts))
            rows += 1 + len(drafts)
        if not constrained:
            return None
        if self._begun is not None:
            wait((self._begun,))  # of a step that has failed: nobody has asked for its masks
            self._begun = None
        if self._thread is not None and not awaited and rows * self._row_s >= THREAD_FROM_S:
            self._begun = self._thread.submit(self._measured, constrained, rows)
            return self._begun
        self._unmeasured += 1
        fill = self._measured if self._unmeasured >= MEASURED_EVERY else self._fill
        return Ready(fill(constrained, rows))

    def refill(self, bitmask: Bitmask, row: int, matcher: Matcher) -> None:
        """Compute the mask of one row anew, by another matcher and without drafts."""
        self._filler.fill([Constrained(matcher, row)], bitmask)
        if matcher.failed:
            bitmask[row] = ALL_ALLOWED

    def _measured(self, constrained: list[Constrained], rows: int) -> Bitmask:
        """The same as `_fill`, and note what it took."""
        # In a thread, waits for the interpreter do not count; work that is spread over threads is one wait.
        clock = time.monotonic if self._filler.uses_threads(len(constrained)) else time.thread_time
        begun_s = clock()
        bitmask = self._fill(constrained, rows)
        self._row_s += LAST_WEIGHT * ((clock() - begun_s) / rows - self._row_s)
        self._unmeasured = 0
        return bitmask

    def _fill(self, constrained: list[Constrained], rows: int) -> Bitmask:
        """The masks of `rows` rows, of which the others allow all. See Matcher.error afterwards."""
        room = self._rooms.pop(0)
        self._rooms.append(room)
        bitmask = room.rows(rows, self._make_room)
        if rows > len(constrained):  # else each is written to
            bitmask.fill(ALL_ALLOWED)
        self._filler.fill(constrained, bitmask, room.address)
        for matcher, row, drafts in constrained:
            if matcher.failed:
                bitmask[row] = ALL_ALLOWED  # its request ends; the row must only not fail the others
                bitmask[row + 1 : row + 1 + len(drafts)] = NONE_ALLOWED  # no draw behind the first one counts
        return bitmask
