"""Work in a thread of its own: its slice of each turn of the loop, and what becomes of its faults."""

import threading
import time
from collections.abc import Callable

import pytest

from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.host.background import (
    MOST_SKIPPED,
    PATIENCE_S,
    SLICE_S,
    TOLERANCE,
    Pace,
    Turns,
    beside,
    breathe,
    freely,
)


def outcome(work: Callable[[], object]) -> object:
    """What the work returns, once its generator has been advanced to its end."""
    waiting = beside(work)
    while True:
        try:
            next(waiting)
        except StopIteration as end:
            return end.value


def raising(error: Exception) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


def test_the_result_of_the_work_is_returned() -> None:
    assert outcome(lambda: 3) == 3


def test_a_refusal_stays_what_it_is() -> None:
    with pytest.raises(CommandRefused, match="no such group") as refused:
        outcome(raising(CommandRefused("no such group", 409)))
    assert refused.value.status == 409


@pytest.mark.parametrize("fault", [KeyError("group"), PermissionError(13, "Permission denied"), MemoryError()])
def test_any_other_fault_is_the_commands_own_and_a_500(fault: Exception) -> None:
    with pytest.raises(CommandRefused, match=type(fault).__name__) as refused:
        outcome(raising(fault))
    assert refused.value.status == 500


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_slice_that_lasts_needs_no_turn() -> None:
    clock = Clock()
    turns = Turns(clock, longest_breath_s=0.0)
    clock.now = -1.0
    turns.breathe()  # returns


def test_work_rests_from_its_first_breath_on_until_it_is_granted_a_slice() -> None:
    turns = Turns(Clock(), longest_breath_s=None)
    worker = threading.Thread(target=turns.breathe, daemon=True)
    worker.start()
    worker.join(0.05)
    assert worker.is_alive()
    while worker.is_alive():
        turns.grant()
        worker.join(0.01)


def test_the_loop_waits_until_the_slice_is_over() -> None:
    clock, steps = Clock(), []
    turns = Turns(clock, longest_breath_s=None)

    def work() -> None:
        for piece in range(4):
            turns.breathe()
            steps.append(piece)
            clock.now += 0.6 * SLICE_S
        turns.end()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive():
        turns.grant()
        steps.append("step")
    done = [step for i, step in enumerate(steps) if (step, i and steps[i - 1]) != ("step", "step")]
    assert [step for step in done if step != "step"] == [0, 1, 2, 3]
    assert done[done.index(0) : done.index(3)] == [0, 1, "step", 2]  # two pieces to a slice


def test_a_step_slower_than_usual_leaves_less_for_the_slice() -> None:
    pace = Pace()
    assert [pace.slice_after(0.1) for _ in range(3)] == [SLICE_S] * 3
    assert pace.slice_after(0.1 * TOLERANCE + SLICE_S / 4) == pytest.approx(SLICE_S * 3 / 4)
    assert pace.slice_after(0.3) < 0
    assert pace.slice_after(0.05) == SLICE_S


def test_slowness_that_lasts_becomes_usual() -> None:
    pace = Pace()
    pace.slice_after(0.002)
    slices = [pace.slice_after(0.1) for _ in range(40)]
    assert slices[0] < 0 and slices == sorted(slices)
    assert slices[-1] > SLICE_S / 2


def test_work_waits_for_the_end_of_long_steps_a_few_times() -> None:
    turns, slices = Turns(Clock(), longest_breath_s=None), []

    def work() -> None:
        while len(slices) < 3:
            turns.breathe()
            slices.append(True)
            turns._until = -1.0  # the slice is over
        turns.end()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while not turns._resting.is_set():
        pass
    done = []
    for long_step in [*[True] * (MOST_SKIPPED + 1), True, False]:
        turns.grant(long_step)
        done.append(len(slices))
    assert done == [0] * MOST_SKIPPED + [1, 1, 2]


def test_the_loop_does_not_wait_for_work_that_does_not_rest() -> None:
    turns = Turns(Clock(), longest_breath_s=None)
    begun = time.monotonic()
    for _ in range(1000):
        turns.grant()
    assert time.monotonic() - begun < 1000 * PATIENCE_S / 10


def test_the_loops_patience_with_a_long_piece_has_an_end() -> None:
    turns, go_on = Turns(Clock(), longest_breath_s=None), threading.Event()

    def work() -> None:
        turns.breathe()
        go_on.wait()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while not turns._resting.is_set():
        pass
    turns.grant()  # returns though the piece goes on
    assert worker.is_alive()
    go_on.set()
    worker.join()


def test_work_may_go_on_without_turns_for_a_while() -> None:
    breaths: list[bool] = []

    def work() -> None:
        with freely():
            breathe()  # returns, though nobody grants a turn
            breaths.append(True)
        breathe()

    waiting = beside(work)
    next(waiting)
    deadline = time.monotonic() + 10
    while not breaths and time.monotonic() < deadline:
        time.sleep(0.001)
    assert breaths
    with pytest.raises(StopIteration):
        while True:
            next(waiting)


def test_breathing_in_the_loop_itself_waits_for_nobody() -> None:
    breathe()
