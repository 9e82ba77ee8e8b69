"""The processes of other ranks, as rank 0 watches them."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from quartet.scheduler_service.execution.ranks import has_ended_or_was_stopped

PATIENCE_S = 60.0
SHORT_S = 0.6  # a --watchdog-timeout

Process = subprocess.Popen[bytes]


@pytest.fixture
def rank() -> Iterator[Process]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_rank_that_is_stopped_is_noticed(rank: Process) -> None:
    rank.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, rank.pid, os.WSTOPPED)
    assert has_ended_or_was_stopped(rank, SHORT_S).startswith("was stopped for ")


@pytest.mark.parametrize("timeout_s", [SHORT_S, 0.0])
def test_the_end_of_a_rank_is_noticed(rank: Process, timeout_s: float) -> None:
    found: list[str] = []
    watch = threading.Thread(target=lambda: found.append(has_ended_or_was_stopped(rank, timeout_s)))
    watch.start()
    if not timeout_s:  # without a watchdog it may be stopped for ever
        rank.send_signal(signal.SIGSTOP)
    watch.join(3 * SHORT_S)
    assert watch.is_alive()
    rank.kill()
    watch.join(PATIENCE_S)
    assert found == [""]
