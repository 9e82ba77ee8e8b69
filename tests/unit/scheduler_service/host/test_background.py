"""Work in a background thread: its slices between the loop's steps, and what becomes of its errors."""

import threading
import time
from collections.abc import Callable

import pytest

from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.host.background import (
    MAX_SKIPPED,
    SLICE_S,
    SLOW_FACTOR,
    CooperativeThrottle,
    SliceLength,
    Turn,
    run_in_background,
    unthrottled,
    yield_point,
)


def outcome(work: Callable[[], object]) -> object:
    """What the work returns, once its generator has ended."""
    waiting = run_in_background(work)
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


def test_the_works_command_refused_is_raised_unchanged() -> None:
    with pytest.raises(CommandRefused, match="no such group") as refused:
        outcome(raising(CommandRefused("no such group", 409)))
    assert refused.value.status == 409


@pytest.mark.parametrize("fault", [KeyError("group"), PermissionError(13, "Permission denied"), MemoryError()])
def test_any_other_exception_of_the_work_is_a_command_refused_with_status_500(fault: Exception) -> None:
    with pytest.raises(CommandRefused, match=type(fault).__name__) as refused:
        outcome(raising(fault))
    assert refused.value.status == 500


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_yield_point_returns_at_once_while_the_slice_lasts() -> None:
    clock = Clock()
    throttle = CooperativeThrottle(clock, max_wait_s=0.0)
    clock.now = -1.0
    throttle.yield_point()  # returns


def test_work_waits_at_its_first_yield_point_until_it_is_granted_a_slice() -> None:
    throttle = CooperativeThrottle(Clock(), max_wait_s=None)
    worker = threading.Thread(target=throttle.yield_point, daemon=True)
    worker.start()
    worker.join(0.05)
    assert worker.is_alive()
    while worker.is_alive():
        throttle.grant()
        worker.join(0.01)


def test_the_loop_waits_until_the_slice_is_over() -> None:
    clock, steps = Clock(), []
    throttle = CooperativeThrottle(clock, max_wait_s=None)

    def work() -> None:
        for piece in range(4):
            throttle.yield_point()
            steps.append(piece)
            clock.now += 0.6 * SLICE_S
        throttle.finish()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive():
        throttle.grant()
        steps.append("step")
    done = [step for i, step in enumerate(steps) if (step, i and steps[i - 1]) != ("step", "step")]
    assert [step for step in done if step != "step"] == [0, 1, 2, 3]
    assert done[done.index(0) : done.index(3)] == [0, 1, "step", 2]  # two pieces to a slice


def test_a_slice_is_at_most_as_long_as_the_work_asks_for() -> None:
    assert SliceLength(0.01).after_step(1.0) == 0.01
    assert SliceLength().after_step(1.0) == SLICE_S


def test_a_step_slower_than_the_average_makes_the_slice_shorter() -> None:
    length = SliceLength()
    assert [length.after_step(0.1) for _ in range(3)] == [SLICE_S] * 3
    assert length.after_step(0.1 * SLOW_FACTOR + SLICE_S / 4) == pytest.approx(SLICE_S * 3 / 4)
    assert length.after_step(0.3) < 0
    assert length.after_step(0.05) == SLICE_S


def test_steps_that_stay_slow_become_the_average() -> None:
    length = SliceLength()
    length.after_step(0.002)
    slices = [length.after_step(0.1) for _ in range(40)]
    assert slices[0] < 0 and slices == sorted(slices)
    assert slices[-1] > SLICE_S / 2


def test_work_waits_for_the_end_of_long_steps_a_few_times_at_most() -> None:
    throttle, slices = CooperativeThrottle(Clock(), max_wait_s=None), []

    def work() -> None:
        while len(slices) < 3:
            throttle.yield_point()
            slices.append(True)
            throttle._slice_ends_at = -1.0  # the slice is over
        throttle.finish()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while not throttle._work_waits.is_set():
        pass
    done = []
    for long_step in [*[True] * (MAX_SKIPPED + 1), True, False]:
        throttle.grant(long_step)
        done.append(len(slices))
    assert done == [0] * MAX_SKIPPED + [1, 1, 2]


def test_the_loop_does_not_wait_for_work_that_is_at_no_yield_point(monkeypatch: pytest.MonkeyPatch) -> None:
    throttle = CooperativeThrottle(Clock(), max_wait_s=None)
    waits: list[float | None] = []
    monkeypatch.setattr(throttle._work_waits, "wait", waits.append)
    for _ in range(1000):
        throttle.grant()
    assert not waits


def test_the_loop_waits_for_a_long_piece_for_a_limited_time() -> None:
    throttle, go_on = CooperativeThrottle(Clock(), max_wait_s=None), threading.Event()

    def work() -> None:
        throttle.yield_point()
        go_on.wait()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while not throttle._work_waits.is_set():
        pass
    throttle.grant()  # returns though the piece goes on
    assert worker.is_alive()
    go_on.set()
    worker.join()


def test_unthrottled_work_waits_at_no_yield_point() -> None:
    passed: list[bool] = []

    def work() -> None:
        with unthrottled():
            yield_point()  # returns, though nobody grants a slice
            passed.append(True)
        yield_point()

    waiting = run_in_background(work)
    next(waiting)
    deadline = time.monotonic() + 120
    while not passed and time.monotonic() < deadline:
        time.sleep(0.001)
    assert passed
    with pytest.raises(StopIteration):
        while True:
            next(waiting)


def pieces(done: list[int], count: int = 500) -> Callable[[], None]:
    """Work of so many pieces: more than a slice has, and than end in time if each waits as long as it may."""

    def work() -> None:
        for piece in range(count):
            yield_point()
            done.append(piece)
            time.sleep(0.001)

    return work


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def test_work_that_nobody_resumes_goes_on() -> None:
    done: list[int] = []
    waiting = run_in_background(pieces(done))
    next(waiting)
    waiting.close()
    wait_for(lambda: len(done) == 500)


def test_the_loop_lifts_the_throttle_of_the_work_it_waits_for() -> None:
    turn, done = Turn(), list[int]()

    def work() -> None:
        with turn:
            pieces(done)()

    waiting = run_in_background(work)
    next(waiting)
    wait_for(lambda: turn.taken)
    assert not turn.take(wait=False)
    with turn:  # in the loop's thread, which grants nothing meanwhile
        assert len(done) == 500
    assert not turn.taken


def test_a_granted_slice_ends_what_was_lifted() -> None:
    throttle = CooperativeThrottle(Clock(), max_wait_s=None)
    throttle.lift()
    throttle.yield_point()  # returns
    throttle.grant()
    worker = threading.Thread(target=throttle.yield_point, daemon=True)
    worker.start()
    worker.join(0.05)
    assert worker.is_alive()
    throttle.lift()
    worker.join(120)
    assert not worker.is_alive()


def test_a_yield_point_in_the_loops_own_thread_does_nothing() -> None:
    yield_point()
