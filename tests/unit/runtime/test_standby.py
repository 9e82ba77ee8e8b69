"""A process that stands by: its imports give way to others, the service that it becomes does not."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from quartet.runtime.process.python_path import python_path
from quartet.runtime.service import Boot
from quartet.runtime.standby import NICEST
from tests.configs import resolved

PRIORITY = "os.getpriority(os.PRIO_PROCESS, threading.get_native_id())"
NOTES_PRIORITY = f"""
import os, threading
WHEN_IMPORTED = {PRIORITY}
def main(boot):
    print(boot.role, WHEN_IMPORTED, {PRIORITY}, threading.current_thread() is threading.main_thread())
"""


@pytest.fixture
def stand_by(tmp_path):
    """Have a process stand by for a service with this source, give it its boot file; returns its end."""

    def run(source: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "late_service.py").write_text(source)
        ready_read, ready_write = os.pipe()
        lifeline_read, lifeline_write = os.pipe()
        boot = Boot(
            role="scheduler",
            run_dir=str(tmp_path),
            inbox="",
            outbox="",
            config=resolved(),
            ready_fd=ready_write,
            lifeline_fd=lifeline_read,
            parent_pid=os.getpid(),
        )
        boot_file = Path(tmp_path / "boot")
        boot_file.write_bytes(msgspec.msgpack.encode(boot))
        try:
            return subprocess.run(
                [sys.executable, "-P", "-m", "quartet.runtime.standby", "late_service"],
                input=f"{boot_file}\n",
                pass_fds=[ready_write, lifeline_read],
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
                env={**os.environ, "PYTHONPATH": f"{python_path(os.environ)}:{tmp_path}"},
            )
        finally:
            for fd in (ready_read, ready_write, lifeline_read, lifeline_write):
                os.close(fd)

    return run


def test_imports_have_the_lowest_priority_and_the_service_its_own(stand_by):
    ended = stand_by(NOTES_PRIORITY)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert (ended.returncode, ended.stdout) == (0, f"scheduler {NICEST} {own} True\n"), ended.stderr


def test_a_module_that_cannot_be_imported_ends_the_process_with_one_traceback(stand_by):
    ended = stand_by("import no_such_module")
    assert ended.returncode == 1
    assert ended.stderr.count("ModuleNotFoundError: No module named 'no_such_module'") == 1
