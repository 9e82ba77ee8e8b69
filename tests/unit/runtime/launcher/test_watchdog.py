import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from quartet.runtime.launcher.watchdog import Sign, StallTimer, Watchdog, sign
from quartet.runtime.process import vitals
from quartet.runtime.process.progress import ProgressReader
from quartet.runtime.process.vitals import FROZEN_S, LOOK_EVERY_S, State, Vitals

STOPPED, ASLEEP, BLOCKED, RUNNABLE = State.STOPPED, State.ASLEEP, State.BLOCKED, State.RUNNABLE
WAIT_S = 60.0


def test_time_without_a_beat_adds_up_and_a_beat_ends_it() -> None:
    watch = StallTimer()
    looks = [watch.still_s(7, 100 + i * LOOK_EVERY_S) for i in range(5)]
    assert looks == [i * LOOK_EVERY_S for i in range(5)]
    assert watch.still_s(8, 103) == 0.0


def test_time_in_which_nobody_looked_does_not_count() -> None:
    watch = StallTimer()
    watch.still_s(7, 100.0)
    assert watch.still_s(7, 500.0) == 2 * LOOK_EVERY_S


def test_time_that_is_taken_back_does_not_count() -> None:
    watch = StallTimer()
    for now in (100.0, 100.5, 101.0):
        watch.still_s(7, now)
    assert watch.take_back() == 0.5
    assert watch.still_s(7, 101.5) == 1.0
    assert watch.restart() == 0.0


@pytest.mark.parametrize(
    ("state", "active_s", "passed_s", "expected"),
    [
        (STOPPED, 0.0, 0.5, Sign.STILL),  # SIGSTOP, a debugger
        (STOPPED, 0.0001, 0.5, Sign.MOVED),  # stopped and continued in turn, as cpulimit does
        (ASLEEP, 0.0, 0.5, Sign.STILL),  # a deadlock
        (ASLEEP, 0.01, 0.5, Sign.STILL),  # its threads look for the interpreter, and find it held
        (ASLEEP, 0.03, 0.5, Sign.MOVED),
        (ASLEEP, 0.03, 5.0, Sign.STILL),
        (ASLEEP, 1.7, 0.5, Sign.MOVED),  # several threads compute
        (RUNNABLE, 0.0, 0.5, Sign.SLOW),  # waits for a core all the time: it is counted when it gets one
        (RUNNABLE, 0.01, 0.5, Sign.SLOW),
        (RUNNABLE, 0.5, 0.5, Sign.MOVED),  # C code that holds the interpreter
        (BLOCKED, 0.0, 0.5, Sign.SLOW),  # its memory comes from a disk
        (BLOCKED, 0.2, 0.5, Sign.MOVED),
    ],
)
def test_only_who_is_stopped_or_asleep_without_using_a_core_is_still(
    state: State, active_s: float, passed_s: float, expected: Sign
) -> None:
    assert sign(Vitals(ASLEEP, {1: 5.0}), Vitals(state, {1: 5.0 + active_s}), passed_s) is expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [(STOPPED, Sign.STILL), (ASLEEP, Sign.STILL), (RUNNABLE, Sign.SLOW), (BLOCKED, Sign.SLOW)],
)
def test_the_first_look_has_nothing_but_the_state(state: State, expected: Sign) -> None:
    assert sign(None, Vitals(state, {1: 5.0}), 0.5) is expected


def test_who_cannot_be_looked_at_is_not_taken_for_stopped() -> None:
    assert sign(Vitals(ASLEEP, {1: 5.0}), None, 0.5) is Sign.SLOW
    assert sign(None, None, 0.5) is Sign.SLOW


class Counts:
    """A progress word whose counts the test sets."""

    def __init__(self, beats: int = 1, pulses: int = 1) -> None:
        self.counts = [beats, pulses]

    def beats(self) -> int:
        return self.counts[0]

    def pulses(self) -> int:
        return self.counts[1]


def still() -> Vitals:
    return Vitals(STOPPED, {1: 0.0})


def hang_after(
    counts: Counts,
    timeout_s: float,
    looks_s: Sequence[float],
    moves: Sequence[int] = (),
    look: Callable[[], Vitals | None] = still,
) -> str:
    """What a watchdog says after looks at these times; `moves` go on counting: 0 the beats, 1 the pulses."""
    watchdog, said = Watchdog(counts, look), ""
    for now in looks_s:
        for index in moves:
            counts.counts[index] += 1
        said = watchdog.reason_to_replace(timeout_s, now)
    return said


def seconds(count: float) -> list[float]:
    return [100 + i * LOOK_EVERY_S for i in range(int(count / LOOK_EVERY_S) + 2)]


@pytest.mark.parametrize(
    ("timeout_s", "for_s", "moves", "hang"),
    [
        (300, 20, (0, 1), ""),
        (300, 20, (1,), ""),  # a long step
        (300, 301, (1,), "has not moved for 300 s (--watchdog-timeout)"),
        (300, 9, (), ""),
        (300, 11, (), "has not moved for 10 s (none of its threads runs)"),
        (3, 4, (), "has not moved for 3 s (--watchdog-timeout)"),
        (3, 4, (0,), "has not moved for 3 s (--watchdog-timeout)"),
    ],
)
def test_a_process_may_take_long_for_a_step_but_must_run(
    timeout_s: float, for_s: float, moves: Sequence[int], hang: str
) -> None:
    assert hang_after(Counts(), timeout_s, seconds(for_s), moves) == hang


@pytest.mark.parametrize("state", [RUNNABLE, BLOCKED])
def test_a_process_without_a_pulse_that_would_run_if_it_could_has_the_whole_time_out(state: State) -> None:
    def look() -> Vitals:
        return Vitals(state, {1: 0.0})

    assert hang_after(Counts(), 300, seconds(295), look=look) == ""
    assert hang_after(Counts(), 300, seconds(301), look=look) == "has not moved for 300 s (--watchdog-timeout)"


def test_a_process_whose_kernel_tells_nothing_has_the_whole_time_out() -> None:
    assert hang_after(Counts(), 300, seconds(295), look=lambda: None) == ""


def test_a_wait_for_a_core_now_and_then_does_not_hide_that_nothing_moves() -> None:
    states = iter([RUNNABLE, ASLEEP, ASLEEP, ASLEEP] * 100)
    assert hang_after(Counts(), 300, seconds(15), look=lambda: Vitals(next(states), {1: 0.0})) != ""


def test_a_process_that_has_never_shown_itself_is_not_judged() -> None:
    assert hang_after(Counts(beats=0, pulses=0), 3, seconds(60)) == ""


def test_a_server_that_was_frozen_as_a_whole_is_not_hung() -> None:
    looks = [100 + i * LOOK_EVERY_S for i in range(4)]
    looks += [look + 3600 for look in looks]  # a laptop that slept, a paused machine, a stopped process group
    assert hang_after(Counts(), 10, looks) == ""


# a real process that holds the interpreter in C, and so has no pulse

HOLDER = """
import sys, time
from quartet.runtime.process.progress import ProgressWord
word = ProgressWord(sys.argv[1], "scheduler")
word.beat(busy=True)
word.start_pulse()
while not word._words[3]:
    time.sleep(0.01)
print(flush=True)
sum(range(10**15))
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def stop(pid: int) -> Vitals:
    os.kill(pid, signal.SIGSTOP)
    return wait_for(pid, lambda vitals: vitals.state is STOPPED)


def run_a_little(pid: int, before: Vitals) -> None:
    os.kill(pid, signal.SIGCONT)
    wait_for(pid, lambda vitals: vitals.active_since(before) > 0)


def wait_for(pid: int, found: Callable[[Vitals], bool]) -> Vitals:
    deadline = time.monotonic() + WAIT_S
    while True:
        now = vitals.read_vitals(pid)
        assert now is not None and time.monotonic() < deadline
        if found(now):
            return now
        time.sleep(0.001)


def test_a_process_that_gets_hardly_any_time_is_slow_and_one_that_gets_none_is_stopped(
    tmp_path: Path, holder: int
) -> None:
    watchdog = Watchdog(ProgressReader(str(tmp_path), "scheduler"), lambda: vitals.read_vitals(holder))
    stopped = stop(holder)
    looks = seconds(112)
    for now in looks[:-24]:
        run_a_little(holder, stopped)
        stopped = stop(holder)
        assert watchdog.reason_to_replace(300, now) == ""
    said = [watchdog.reason_to_replace(300, now) for now in looks[-24:]]
    assert said[-1] == "has not moved for 10 s (none of its threads runs)"
    assert not any(said[: int(FROZEN_S / LOOK_EVERY_S)])
