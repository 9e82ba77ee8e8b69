"""A process that stands by: its imports give way to others, the service that it becomes does not."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from quartet.runtime.process.priority import NICEST
from quartet.runtime.process.python_path import python_path
from quartet.runtime.service import NOT_BY_HAND, Boot
from tests.configs import resolved

PRIORITY = "os.getpriority(os.PRIO_PROCESS, threading.get_native_id())"
NOTES_PRIORITY = f"""
import os, threading
from quartet.runtime.service import run
print("imports", flush=True)
WHEN_IMPORTED = {PRIORITY}
def main(boot):
    print(boot.role, WHEN_IMPORTED, {PRIORITY}, threading.current_thread() is threading.main_thread())
"""
NEVER_DONE_IN_A_THREAD = f"""{NOTES_PRIORITY}
if threading.current_thread() is not threading.main_thread():
    threading.Event().wait()
if __name__ == "__main__":
    run(main)
"""
Process = subprocess.Popen[str]


def imports_have_begun(process: Process) -> None:
    assert process.stdout is not None and process.stdout.readline() == "imports\n"


def imports_are_done(process: Process) -> None:
    """Wait until it has closed what the end of its imports is told through."""
    imports_have_begun(process)
    while any("eventfd" in target for target in open_files(process)):
        time.sleep(0.01)


def open_files(process: Process) -> Iterator[str]:
    for fd in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield str(fd.readlink())


@pytest.fixture
def stand_by(tmp_path):
    """Have a process stand by for a service with this source, and give it its boot file behind `wait`.

    Returns its status, what it has printed from then on, and its errors.
    """

    def run(source: str, wait: Callable[[Process], None] = imports_are_done) -> tuple[int, str, str]:
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
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quartet.runtime.standby", "late_service"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[ready_write, lifeline_read],
            text=True,
            env={**os.environ, "PYTHONPATH": f"{python_path(os.environ)}:{tmp_path}"},
        )
        try:
            wait(process)
            out, errors = process.communicate(f"{boot_file}\n", timeout=300)
            return process.returncode, out, errors
        finally:
            process.kill()
            process.communicate()
            for fd in (ready_read, ready_write, lifeline_read, lifeline_write):
                os.close(fd)

    return run


def test_imports_have_the_lowest_priority_and_the_service_its_own(stand_by):
    status, out, errors = stand_by(NOTES_PRIORITY)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert (status, out) == (0, f"scheduler {NICEST} {own} True\n"), errors


def test_who_is_needed_amid_its_imports_does_them_anew_with_its_own_priority(stand_by):
    status, out, errors = stand_by(NEVER_DONE_IN_A_THREAD, imports_have_begun)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert (status, out) == (0, f"imports\nscheduler {own} {own} True\n"), errors


@pytest.mark.parametrize("wait", [imports_are_done, imports_have_begun])
def test_a_module_that_cannot_be_imported_ends_the_process_with_one_traceback(stand_by, wait):
    status, _, errors = stand_by('print("imports", flush=True)\nimport no_such_module', wait)
    assert status == 1
    assert errors.count("ModuleNotFoundError: No module named 'no_such_module'") == 1


def test_who_is_given_no_boot_file_amid_its_imports_ends_behind_them(stand_by):
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "quartet.runtime.standby", "json.tool"],
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1 and NOT_BY_HAND in ended.stderr
