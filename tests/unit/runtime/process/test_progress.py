import os
import signal
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from quartet.runtime.process.progress import PID, PULSE_NS, ProgressReader, ProgressWord


def test_nothing_written_is_infinitely_old_and_not_busy(tmp_path: Path) -> None:
    reader = ProgressReader(str(tmp_path), "scheduler")
    assert (reader.age_s(), reader.busy(), reader.beats()) == (inf, False, 0)


def test_a_reader_opened_before_the_writer_sees_its_beats(tmp_path: Path) -> None:
    reader = ProgressReader(str(tmp_path), "scheduler")
    assert reader.age_s() == inf
    word = ProgressWord(str(tmp_path), "scheduler")
    assert reader.age_s() == inf
    word.beat(busy=True)
    assert reader.age_s() < 60
    assert reader.busy()
    word.beat(busy=False)
    assert (reader.busy(), reader.beats()) == (False, 2)


def test_a_restarted_writer_goes_on_counting(tmp_path: Path) -> None:
    ProgressWord(str(tmp_path), "scheduler").beat(busy=True)
    ProgressWord(str(tmp_path), "scheduler").beat(busy=True)
    assert ProgressReader(str(tmp_path), "scheduler").beats() == 2


def test_pulses_tell_that_the_process_runs_and_beats_that_its_loop_does(tmp_path: Path) -> None:
    word, reader = ProgressWord(str(tmp_path), "scheduler"), ProgressReader(str(tmp_path), "scheduler")
    assert (reader.pulses(), reader.pulse_age_s()) == (0, inf)
    word.pulse()
    assert (reader.pulses(), reader.beats(), reader.age_s()) == (1, 0, inf)
    assert reader.pulse_age_s() < 60


@pytest.mark.parametrize("stopped", [False, True])
def test_a_late_pulse_counts_only_where_the_kernel_says_that_the_process_does_not_run(
    stopped: bool, tmp_path: Path
) -> None:
    word, reader = ProgressWord(str(tmp_path), "scheduler"), ProgressReader(str(tmp_path), "scheduler")
    word.pulse()
    word._words[PULSE_NS] -= int(60e9)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        word._words[PID] = busy.pid
        if stopped:
            busy.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, busy.pid, os.WSTOPPED)
        age_s = reader.pulse_age_s()
        busy.kill()
    assert (age_s > 50) == stopped


def test_whoever_waits_for_another_process_is_busy_and_moves(tmp_path: Path) -> None:
    word, reader = ProgressWord(str(tmp_path), "scheduler"), ProgressReader(str(tmp_path), "scheduler")
    word.wait()
    assert (reader.beats(), reader.busy()) == (1, True)


def test_each_service_has_a_word_of_its_own(tmp_path: Path) -> None:
    ProgressWord(str(tmp_path), "scheduler").beat(busy=True)
    assert ProgressReader(str(tmp_path), "tokenizer").beats() == 0


def test_the_file_is_private(tmp_path: Path) -> None:
    ProgressWord(str(tmp_path), "scheduler")
    assert (tmp_path / "scheduler.progress").stat().st_mode & 0o777 == 0o600
