"""Work beside the loop: a slice of time per turn, and what it did or why it failed."""

import threading

import pytest

from runtime.errors import CommandRefused
from scheduler_service.beside import SLICE_S, Turns, beside, breathe


def finish(generator):
    """Turn the loop until the work has ended."""
    try:
        while True:
            next(generator)
    except StopIteration as end:
        return end.value


def test_the_work_is_done_in_another_thread_and_its_result_comes_back():
    assert finish(beside(threading.get_ident)) != threading.get_ident()


def test_a_refusal_comes_through_and_a_fault_becomes_one():
    def refuse():
        raise CommandRefused("no", 409)

    with pytest.raises(CommandRefused, match="no") as refused:
        finish(beside(refuse))
    assert refused.value.status == 409
    with pytest.raises(CommandRefused) as failed:
        finish(beside(lambda: 1 // 0))
    assert failed.value.status == 500


def test_a_slice_that_lasts_needs_no_turn():
    turns = Turns(clock=lambda: 10.0)
    turns.grant()
    turns.breathe()  # returns


def test_work_whose_slice_is_over_goes_on_with_the_next_turn():
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


def test_breathing_in_the_loop_itself_waits_for_nobody():
    breathe()
