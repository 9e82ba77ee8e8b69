"""Work in a process with a budget: it answers, or is ended, and nobody else notices."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from quartet.runtime.process.guarded import Crashed, Gone, Guarded, OutOfTime
from tests.servers import ROOT

WORK = "tests.stand_ins.guarded_work"


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    guarded = Guarded(WORK)
    yield guarded
    guarded.close()


def pids(guarded: Guarded) -> list[int]:
    return [int(pid) for pid in guarded.run(b"pids", 1.0).split()]


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_an_order_of_any_size_is_answered(guarded: Guarded, size: int) -> None:
    assert guarded.run(b"x" * size, 1.0) == b"x" * size


def test_the_process_is_prepared_with_what_it_is_given_each_time_it_starts() -> None:
    guarded = Guarded(WORK, setup=b"s" * (1 << 20))
    for _ in range(2):
        assert guarded.run(b"setup", 1.0) == b"s" * (1 << 20)
        guarded.end()
    guarded.close()


def test_a_preparation_that_takes_too_much_time_is_ended() -> None:
    guarded = Guarded("tests.stand_ins.guarded_impatient", setup=b"endless")
    with pytest.raises(Gone):
        guarded.run(b"order", 1.0)
    guarded.close()


def test_an_order_that_takes_too_much_time_is_ended_and_the_next_one_is_answered(guarded: Guarded) -> None:
    keeper, _ = pids(guarded)
    with pytest.raises(OutOfTime):
        guarded.run(b"loop", 0.02)
    assert guarded.run(b"next", 1.0) == b"next"
    assert pids(guarded)[0] == keeper, "only the worker is replaced"


@pytest.mark.parametrize("order", [b"memory", b"crash"])
def test_an_order_that_ends_its_worker_is_told_apart(guarded: Guarded, order: bytes) -> None:
    with pytest.raises(Crashed):
        guarded.run(order, 1.0)
    assert guarded.run(b"next", 1.0) == b"next"


def test_a_worker_that_was_killed_between_two_orders_is_replaced(guarded: Guarded) -> None:
    _, worker = pids(guarded)
    psutil.Process(worker).kill()
    psutil.wait_procs([psutil.Process(worker)] if psutil.pid_exists(worker) else [], timeout=120)
    assert guarded.run(b"next", 1.0) == b"next"


def test_what_was_ended_from_another_thread_is_gone_and_starts_again(guarded: Guarded) -> None:
    keeper, worker = pids(guarded)
    threading.Timer(0.05, guarded.end).start()
    with pytest.raises(Gone):
        guarded.run(b"loop", 60.0)
    assert guarded.run(b"next", 1.0) == b"next"
    assert_ended(keeper, worker)


def test_a_process_that_never_answers_is_given_up() -> None:
    guarded = Guarded(WORK)
    assert guarded.run(b"first", 1.0) == b"first"
    guarded._wall_s = 0.1
    with pytest.raises(Gone):
        guarded.run(b"stop", 60.0)
    guarded.close()


def test_a_process_that_takes_long_to_start_is_waited_for() -> None:
    guarded = Guarded(WORK, wall_s=0.0)
    assert guarded.run(b"first", 1.0) == b"first"
    guarded.close()


def test_closing_leaves_no_process_behind(guarded: Guarded) -> None:
    processes = pids(guarded)
    guarded.close()
    assert_ended(*processes)


def test_keeper_and_worker_die_with_the_process_that_uses_them() -> None:
    user = subprocess.Popen(
        [sys.executable, "-m", "tests.stand_ins.guarded_user"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert user.stdout is not None
    keeper, worker = map(int, user.stdout.readline().split())
    os.kill(user.pid, signal.SIGKILL)
    user.wait()
    assert_ended(keeper, worker)
    user.stdout.close()


def assert_ended(*numbers: int) -> None:
    """The processes end: a worker in an endless order never would by itself."""
    running = []
    for number in numbers:
        try:
            running.append(psutil.Process(number))
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(running, timeout=120)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
