import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quartet.runtime.process.vitals import FROZEN_S, LOOK_EVERY_S, State, StopTimer, Vitals, read_vitals

WAIT_S = 60.0
ASLEEP, SPINNING = "import time; time.sleep(600)", "sum(range(10**15))"


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start() -> Iterator[Callable[[str], int]]:
    processes = []

    def make(code: str) -> int:
        processes.append(subprocess.Popen([sys.executable, "-c", code]))
        return processes[-1].pid

    yield make
    for process in processes:
        process.kill()
        process.wait()


def state(pid: int) -> State | None:
    vitals = read_vitals(pid)
    return vitals and vitals.state


@pytest.mark.parametrize(("code", "expected"), [(ASLEEP, State.ASLEEP), (SPINNING, State.RUNNABLE)])
def test_the_state_of_a_process_is_told(start: Callable[[str], int], code: str, expected: State) -> None:
    pid = start(code)
    until(lambda: state(pid) is expected)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state(pid) is State.STOPPED)


def test_a_process_that_runs_is_active_and_a_stopped_one_is_not(start: Callable[[str], int]) -> None:
    pid = start(SPINNING)
    before = read_vitals(pid)
    assert before
    until(lambda: (now := read_vitals(pid)) is not None and now.active_since(before) > 0.05)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state(pid) is State.STOPPED)
    stopped = read_vitals(pid)
    assert stopped and read_vitals(pid) == stopped


def test_one_that_has_ended_tells_nothing() -> None:
    assert read_vitals(1 << 30) is None


def thread(root: Path, tid: int, name: str, state: str, ran_ns: int, waited_ns: int) -> None:
    directory = root / "7" / "task" / str(tid)
    directory.mkdir(parents=True)
    (directory / "stat").write_text(f"{tid} ({name}) {state} 1 1 1 0\n")
    (directory / "schedstat").write_text(f"{ran_ns} {waited_ns} 12\n")


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("S", State.ASLEEP),
        ("SD", State.BLOCKED),
        ("DSR", State.RUNNABLE),
        ("RTS", State.STOPPED),
        ("St", State.STOPPED),
        ("SI", State.ASLEEP),
    ],
)
def test_the_most_telling_state_of_the_threads_counts(tmp_path: Path, letters: str, expected: State) -> None:
    for tid, letter in enumerate(letters):
        thread(tmp_path, tid, "a) R (b", letter, 1, 1)
    vitals = read_vitals(7, tmp_path)
    assert vitals and vitals.state is expected


def test_running_and_waiting_for_a_core_are_both_activity(tmp_path: Path) -> None:
    thread(tmp_path, 7, "python", "S", 2_000_000_000, 1_500_000_000)
    vitals = read_vitals(7, tmp_path)
    assert vitals and vitals.active_since(Vitals(State.ASLEEP, {7: 3.0})) == 0.5
    assert vitals.active_since(Vitals(State.ASLEEP, {6: 9.0})) == 3.5  # a new thread; the old one has ended


def test_threads_of_the_sockets_move_by_themselves_and_say_nothing(tmp_path: Path) -> None:
    thread(tmp_path, 7, "python", "S", 1, 0)
    thread(tmp_path, 8, "ZMQbg/IO/0", "R", 5_000_000_000, 0)
    assert read_vitals(7, tmp_path) == Vitals(State.ASLEEP, {7: 1e-9})


def test_a_kernel_that_does_not_count_tells_nothing(tmp_path: Path) -> None:
    thread(tmp_path, 7, "python", "S", 1, 0)
    (tmp_path / "7" / "task" / "7" / "schedstat").unlink()
    assert read_vitals(7, tmp_path) is None


def test_the_time_of_a_stop_adds_up_and_a_move_ends_it() -> None:
    states = [State.STOPPED] * 4 + [State.ASLEEP, State.STOPPED, State.STOPPED]
    looks = iter([*(Vitals(state, {}) for state in states), None])
    timer = StopTimer(lambda: next(looks))
    found = [timer.stopped_s(100 + place * LOOK_EVERY_S) for place in range(len(states) + 1)]
    assert found == [place * LOOK_EVERY_S for place in (0, 1, 2, 3, 0, 0, 1, 0)]


def test_the_time_of_a_stop_in_which_nobody_looked_does_not_count() -> None:
    timer = StopTimer(lambda: Vitals(State.STOPPED, {}))
    timer.stopped_s(100.0)
    assert timer.stopped_s(500.0) == 2 * LOOK_EVERY_S
    assert timer.reason_to_replace(FROZEN_S, 501.0) == ""
