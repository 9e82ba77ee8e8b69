"""Where the masks of a step are computed: at once, or in a thread beside the forward pass."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from quartet.scheduler_service.grammar.masks import MEASURED_EVERY, THREAD_FROM_S, Masks
from quartet.scheduler_service.grammar.matchers import Bitmask, Constrained, Matcher


class StandInMatcher:
    failed = False


class StandInFiller:
    """Allows token 0 alone; notes the thread, and takes as long as the test says on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.takes_s = 0.0
        self.now_s = 0.0
        self.threads: list[str] = []
        monkeypatch.setattr(time, "thread_time", lambda: self.now_s)

    def uses_threads(self, requests: int) -> bool:
        return False

    def fill(self, constrained: list[Constrained], bitmask: Bitmask, address: int = 0) -> None:
        assert address in (0, bitmask.ctypes.data)
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
    for _ in range(MEASURED_EVERY + 1):
        step(masks)
    assert own_thread(filler)


def test_many_rows_go_to_the_thread_where_few_do_not(filler: StandInFiller) -> None:
    masks = masks_with(filler)
    filler.takes_s = THREAD_FROM_S / 10
    for _ in range(20):
        step(masks)
    step(masks, rows=60)
    assert own_thread(filler)


def test_masks_that_are_waited_for_are_computed_at_once_whatever_they_cost(filler: StandInFiller) -> None:
    masks = masks_with(filler)
    filler.takes_s = 10 * THREAD_FROM_S
    matcher: Any = StandInMatcher()
    for _ in range(2):
        assert masks.start([(matcher, ())] * 60, awaited=True) is not None and not own_thread(filler)


def test_a_step_without_a_grammar_has_no_masks(filler: StandInFiller) -> None:
    assert masks_with(filler).start([(None, ()), (None, ())]) is None and not filler.threads


class ScriptedMatcher:
    """Its rows get this number in each word."""

    def __init__(self, number: int, failed: bool = False) -> None:
        self.number, self.failed = number, failed


def matcher(number: int, failed: bool = False) -> Matcher:
    scripted: Any = ScriptedMatcher(number, failed)
    return scripted


class ScriptedFiller:
    """Writes each matcher's number; waits for `go` first. Notes when it begins and ends."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.notes: list[str] = []

    def uses_threads(self, requests: int) -> bool:
        return False

    def fill(self, constrained: list[Constrained], bitmask: Bitmask, address: int = 0) -> None:
        assert address in (0, bitmask.ctypes.data)
        self.notes.append("begin")
        assert self.go.wait(120)
        for matcher, row, drafts in constrained:
            bitmask[row : row + 1 + len(drafts)] = matcher.number  # type: ignore[attr-defined]
        self.notes.append("end")


@pytest.fixture
def scripted() -> Masks:
    return scripted_masks()


def scripted_masks(**options: Any) -> Masks:
    masks: Any = Masks(64, threaded=True, **options)
    masks._filler = ScriptedFiller()
    return masks


def numbers(masks: Masks, *requests: tuple[Any, tuple[int, ...]]) -> list[int]:
    """The first word of each row of a step."""
    begun = masks.start(requests)
    assert begun is not None
    bitmask = begun.result(120)
    assert (bitmask == bitmask[:, :1]).all()
    first: list[int] = bitmask[:, 0].tolist()
    return first


def test_rows_without_a_grammar_allow_all_whatever_stood_there_before(scripted: Masks) -> None:
    one, two = matcher(1), matcher(2)
    assert numbers(scripted, (one, ()), (two, ()), (one, (7, 8))) == [1, 2, 1, 1, 1]
    assert numbers(scripted, (None, ()), (two, ()), (None, (7,))) == [-1, 2, -1, -1]
    assert numbers(scripted, (two, ())) == [2]


def test_with_two_rooms_masks_stay_until_those_behind_the_next_are_begun() -> None:
    made: list[tuple[int, int]] = []

    def make_room(rows: int, words: int) -> Bitmask:
        made.append((rows, words))
        return np.empty((4, words), np.int32)

    masks = scripted_masks(rooms=2, make_room=make_room)
    first, second = (masks.start([(matcher(number), ())] * 3) for number in (1, 2))
    assert first is not None and second is not None
    assert [begun.result(120)[:, 0].tolist() for begun in (first, second)] == [[1, 1, 1], [2, 2, 2]]
    assert numbers(masks, (matcher(3), ())) == [3]
    assert [begun.result(120)[:, 0].tolist() for begun in (first, second)] == [[3, 1, 1], [2, 2, 2]]
    assert numbers(masks, *[(matcher(4), ())] * 4) == [4] * 4 and made == [(3, 2), (3, 2)]


def test_a_failed_request_harms_no_other_row_and_none_of_its_drafts_counts(scripted: Masks) -> None:
    assert numbers(scripted, (matcher(1), ()), (matcher(2, failed=True), (7, 8))) == [1, -1, 0, 0]


def test_one_row_is_computed_anew_and_the_others_stay(scripted: Masks) -> None:
    begun = scripted.start([(matcher(1), ()), (matcher(2), (5,)), (matcher(3), ())])
    assert begun is not None
    bitmask = begun.result(120)
    scripted.refill(bitmask, 1, matcher(9))
    assert bitmask[:, 0].tolist() == [1, 9, 2, 3]
    scripted.refill(bitmask, 3, matcher(9, failed=True))
    assert bitmask[:, 0].tolist() == [1, 9, 2, -1]


def test_masks_that_nobody_asked_for_are_complete_before_the_next_are_begun(scripted: Any) -> None:
    """A step failed while its masks were being computed; its requests are computed again."""
    filler = scripted._filler
    filler.go.clear()
    scripted.start([(matcher(1), ())] * 3)
    scripted._row_s = 0.0  # the next are computed at once
    threading.Timer(0.05, filler.go.set).start()
    assert numbers(scripted, (matcher(2), ()), (matcher(3), ())) == [2, 3]
    assert filler.notes == ["begin", "end"] * 2
