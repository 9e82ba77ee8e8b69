"""What every service does at start and at its end."""

import os
import subprocess
import sys

import msgspec
import pytest

from quartet.runtime.service import EXIT_STARTUP, Boot, Ready, report_ready
from tests.configs import resolved

BODIES = {
    "returns": "pass",
    "refuses": "from quartet.runtime.errors import StartupError; raise StartupError('too big; use --page-size 1')",
    "crashes": "1 / 0",
    "exits": "sys.exit(7)",
    "orphaned": "pass",
}


@pytest.fixture
def start(tmp_path):
    """Run a service whose main has this body; returns its exit status, its Ready line and its stderr."""

    def run(body, parent_pid=None):
        ready_read, ready_write = os.pipe()
        lifeline_read, lifeline_write = os.pipe()
        boot = Boot(
            role="tokenizer",
            run_dir=str(tmp_path),
            inbox="",
            outbox="",
            config=resolved(),
            ready_fd=ready_write,
            lifeline_fd=lifeline_read,
            parent_pid=parent_pid or os.getpid(),
        )
        (tmp_path / "boot").write_bytes(msgspec.msgpack.encode(boot))
        code = (
            f"import sys\nfrom quartet.runtime.service import run, report_ready\ndef main(boot):\n    {body}\nrun(main)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", code],
            input=f"{tmp_path / 'boot'}\n",
            pass_fds=[ready_write, lifeline_read],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for fd in (ready_write, lifeline_read, lifeline_write):
            os.close(fd)
        with open(ready_read, "rb") as pipe:
            line = pipe.read()
        return ended.returncode, line, ended.stderr

    return run


def test_a_main_that_returns_ends_with_status_zero(start):
    assert start(BODIES["returns"]) == (0, b"", "")


def test_a_startup_error_travels_in_the_ready_line(start):
    status, line, printed = start(BODIES["refuses"])
    assert status == EXIT_STARTUP
    assert msgspec.json.decode(line, type=Ready) == Ready(role="tokenizer", error="too big; use --page-size 1")
    assert printed == ""


def test_a_bug_is_logged_with_its_traceback_and_ends_with_status_one(start):
    status, line, printed = start(BODIES["crashes"])
    assert (status, line) == (1, b"")
    assert "tokenizer hit an exception:\n    Traceback" in printed
    assert "ZeroDivisionError" in printed


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("PermissionError(13, 'Permission denied', '/m/tokenizer.json')", "Permission denied: /m/tokenizer.json"),
        ("OSError(28, 'No space left on device')", "No space left on device; free some space"),
        ("OSError(24, 'Too many open files')", "Too many open files; raise the limit of open files (ulimit -n)"),
        ("OSError(27, 'File too large')", "File too large; raise the limit of a file's size (ulimit -f)"),
        ("MemoryError()", "there is not enough memory"),
        ("__import__('zmq').ZMQError(24)", "Too many open files; raise the limit of open files (ulimit -n)"),
    ],
)
def test_what_the_system_refuses_before_the_service_serves_is_one_line_and_no_traceback(start, raised, said):
    status, line, printed = start(f"raise {raised}")
    assert status == EXIT_STARTUP
    error = msgspec.json.decode(line, type=Ready).error
    assert error.startswith(f"the tokenizer cannot start: {said}")
    assert printed == ""


def test_what_the_system_refuses_later_is_a_death_with_its_traceback(start):
    status, _, printed = start("report_ready(boot); raise OSError(28, 'No space left on device')")
    assert status == 1
    assert "Traceback" in printed


def test_a_boot_file_that_cannot_be_read_is_one_line(start, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "from quartet.runtime.service import run; run(print)"],
        input=f"{tmp_path / 'gone'}\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, len(ended.stderr.splitlines())) == (EXIT_STARTUP, 1)
    assert "No such file or directory" in ended.stderr


def test_an_exit_status_asked_for_is_kept(start):
    assert start(BODIES["exits"])[0] == 7


def test_a_startup_error_after_ready_is_logged_like_any_other_failure(start):
    status, line, printed = start("report_ready(boot); " + BODIES["refuses"])
    assert status == EXIT_STARTUP
    assert msgspec.json.decode(line, type=Ready) == Ready(role="tokenizer")
    assert "too big; use --page-size 1" in printed


def test_a_child_whose_parent_is_gone_already_ends_at_once(start):
    assert start("raise AssertionError('main was reached')", parent_pid=1) == (1, b"", "")


def test_report_ready_writes_one_line_and_closes_the_pipe():
    ready_read, ready_write = os.pipe()
    boot = Boot(
        role="gateway",
        run_dir="",
        inbox="",
        outbox="",
        config=resolved(),
        ready_fd=ready_write,
        lifeline_fd=-1,
        parent_pid=0,
    )
    report_ready(boot)
    with open(ready_read, "rb") as pipe:
        assert pipe.read().count(b"\n") == 1


def test_a_boot_survives_its_file():
    boot = Boot(
        role="gateway",
        run_dir="/r",
        inbox="i",
        outbox="o",
        config=resolved(port=1, api_key="k"),
        ready_fd=3,
        lifeline_fd=4,
        parent_pid=5,
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(boot), type=Boot) == boot
