"""Work in a thread of its own: its slice of each turn of the loop, and what becomes of its faults."""

import threading
from collections.abc import Callable

import pytest

from runtime.errors import CommandRefused
from scheduler_service.beside import SLICE_S, Turns, beside, breathe


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


def test_a_slice_that_lasts_needs_no_turn() -> None:
    turns = Turns(clock=lambda: 10.0)
    turns.grant()
    turns.breathe()  # returns


def test_work_whose_slice_is_over_goes_on_with_the_next_turn() -> None:
    now = [0.0]
    turns = Turns(clock=lambda: now[0], longest_breath_s=None)
    turns.grant()
    now[0] = SLICE_S
    worker = threading.Thread(target=turns.breathe, daemon=True)
    worker.start()
    worker.join(0.05)
    assert worker.is_alive()
    while worker.is_alive():
        turns.grant()
        worker.join(0.01)


def test_breathing_in_the_loop_itself_waits_for_nobody() -> None:
    breathe()
