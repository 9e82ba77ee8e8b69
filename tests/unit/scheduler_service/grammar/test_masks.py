"""Where the masks of a step are computed: at once, or in a thread beside the forward pass."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from quartet.scheduler_service.grammar.masks import THREAD_FROM_S, Masks
from quartet.scheduler_service.grammar.matchers import Bitmask, Constrained


class StandInMatcher:
    failed = False


class StandInFiller:
    """Allows token 0 alone; notes the thread, and takes as long as the test says on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.takes_s = 0.0
        self.now_s = 0.0
        self.threads: list[str] = []
        monkeypatch.setattr(time, "thread_time", lambda: self.now_s)

    def fill(self, constrained: list[Constrained], bitmask: Bitmask) -> None:
        self.threads.append(threading.current_thread().name)
        self.now_s += self.takes_s
        for _, row, _ in constrained:
            bitmask[row] = 1


def step(masks: Masks, rows: int = 4) -> Bitmask:
    matcher: Any = StandInMatcher()
    begun = masks.start([(matcher, ())] * rows)
    assert begun is not None
    return begun.result(120)


@pytest.fixture
def filler(monkeypatch: pytest.MonkeyPatch) -> StandInFiller:
    return StandInFiller(monkeypatch)


def masks_with(filler: StandInFiller) -> Masks:
    masks: Any = Masks(64, threaded=True)
    masks._filler = filler
    return masks


def own_thread(filler: StandInFiller) -> bool:
    return filler.threads[-1] != threading.current_thread().name


def test_masks_of_unknown_cost_are_computed_in_the_thread(filler: StandInFiller) -> None:
    bitmask = step(masks_with(filler))
    assert own_thread(filler) and np.array_equal(bitmask, np.ones((4, 2), np.int32))


def test_cheap_masks_are_soon_computed_at_once_and_costly_ones_in_the_thread_again(filler: StandInFiller) -> None:
    masks = masks_with(filler)
    filler.takes_s = THREAD_FROM_S / 10
    for _ in range(20):
        step(masks)
    assert not own_thread(filler)
    filler.takes_s = 10 * THREAD_FROM_S
    step(masks)
    step(masks)
    assert own_thread(filler)


def test_many_rows_go_to_the_thread_where_few_do_not(filler: StandInFiller) -> None:
    masks = masks_with(filler)
    filler.takes_s = THREAD_FROM_S / 10
    for _ in range(20):
        step(masks)
    step(masks, rows=60)
    assert own_thread(filler)


def test_a_step_without_a_grammar_has_no_masks(filler: StandInFiller) -> None:
    assert masks_with(filler).start([(None, ()), (None, ())]) is None and not filler.threads
