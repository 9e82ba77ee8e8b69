"""What a process has used."""

import os
import time

from quartet.runtime.process.usage import usage_of


def test_cpu_time_and_memory_are_those_that_the_process_sees_itself():
    before = usage_of(os.getpid())
    ends_at = time.process_time() + 0.1
    while time.process_time() < ends_at:
        pass
    after = usage_of(os.getpid())
    assert after.cpu_s - before.cpu_s >= 0.05  # the system counts in ticks
    assert after.resident_bytes > 1 << 20


def test_a_process_that_has_ended_has_used_nothing_that_can_be_told(tmp_path):
    assert usage_of(1 << 30) is None
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text("7 (x) R 1")
    assert usage_of(7, tmp_path) is None
