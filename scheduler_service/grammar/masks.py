"""Which tokens the grammars of a step allow.

The masks are begun before the forward pass and computed at the same time, in a thread that needs no interpreter while
it does so; the draw finds them ready. Where the last step's tokens are still on a device, they are begun once those are
here, and the device computes meanwhile.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from quartet.scheduler_service.grammar.matchers import Bitmask, Constrained, MaskFiller, Matcher, bitmask_words

ALL_ALLOWED = -1  # 32 set bits
NONE_ALLOWED = 0
THREADS = 2


class Masks:
    """Makes the bit masks of constrained rows."""

    def __init__(self, vocab_size: int, threaded: bool | None = None) -> None:
        """`threaded`: whether they have a thread of their own; by default where there is a second core."""
        self._words = bitmask_words(vocab_size)
        self._filler = MaskFiller(THREADS)
        threaded = len(os.sched_getaffinity(0)) > 1 if threaded is None else threaded
        self._thread = ThreadPoolExecutor(1, "masks") if threaded else None

    def start(self, requests: Sequence[tuple[Matcher | None, tuple[int, ...]]]) -> "Future[Bitmask] | None":
        """Begin the masks of a step's rows: for each request, one, and one more behind each of its drafts.

        None where no request is constrained. Until the result is there, nobody else may use the matchers.
        """
        constrained, rows = [], 0
        for matcher, drafts in requests:
            if matcher is not None:
                constrained.append(Constrained(matcher, rows, drafts))
            rows += 1 + len(drafts)
        if not constrained:
            return None
        if self._thread is not None:
            return self._thread.submit(self.fill, constrained, rows)
        done: Future[Bitmask] = Future()
        done.set_result(self.fill(constrained, rows))
        return done

    def fill(self, constrained: list[Constrained], rows: int) -> Bitmask:
        """The masks of `rows` rows, of which the others allow all. See Matcher.error afterwards."""
        bitmask = np.full((rows, self._words), ALL_ALLOWED, dtype=np.int32)
        self._filler.fill(constrained, bitmask)
        for matcher, row, drafts in constrained:
            if matcher.failed:
                bitmask[row] = ALL_ALLOWED  # its request ends; the row must only not fail the others
                bitmask[row + 1 : row + 1 + len(drafts)] = NONE_ALLOWED  # no draw behind the first one counts
        return bitmask
