"""Starts on a machine that has too little of something, or where nobody listens: one line, a status, no traceback."""

import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.launcher.supervisor import ExitStatus
from tests.servers import ROOT, STAND_INS

WAIT_S = 60


def started(tmp_path: Path, before: Callable[[], Any] | None = None, **streams: Any) -> "subprocess.Popen[bytes]":
    """A launcher with stand-ins for its services."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "vocab_size": 8}')
    replaced = [f"{role}={module}" for role, module in STAND_INS.items()]
    flags = ["--port", "0", "--model-path", str(tmp_path)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.launcher", *replaced, "--", *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(tmp_path / "notify")},
        stdin=subprocess.DEVNULL,
        preexec_fn=before,
        **streams,
    )


@pytest.mark.parametrize(
    ("kind", "limit", "said"),
    [
        (resource.RLIMIT_NOFILE, 20, "only 20 files may be open"),
        (resource.RLIMIT_FSIZE, 0, "File too large; raise the limit of a file's size (ulimit -f)"),
        (resource.RLIMIT_FSIZE, 500, "File too large"),
    ],
)
def test_too_little_of_something_is_one_line_and_the_status_of_a_start(
    tmp_path: Path, kind: int, limit: int, said: str
) -> None:
    process = started(
        tmp_path, lambda: resource.setrlimit(kind, (limit, limit)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printed = process.communicate(timeout=WAIT_S)[0].decode()
    assert process.returncode == ExitStatus.STARTUP
    assert printed.startswith("quartet: ") and said in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_server_whose_streams_are_closed_serves(tmp_path: Path, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    check_that_it_serves(tmp_path, close, {})


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_server_whose_disk_for_logs_is_full_serves(tmp_path: Path, stream: str) -> None:
    with open("/dev/full", "wb") as full:
        check_that_it_serves(tmp_path, None, {stream: full})


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_server_whose_reader_has_left_serves(tmp_path: Path, stream: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    check_that_it_serves(tmp_path, None, {stream: write_end})
    os.close(write_end)


def check_that_it_serves(tmp_path: Path, before: Callable[[], Any] | None, streams: dict[str, Any]) -> None:
    """It says so to systemd's socket, and ends at SIGTERM with the status of a clean end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        process = started(tmp_path, before, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams})
        try:
            ready, _, _ = select.select([manager], [], [], WAIT_S)
            assert ready, f"not ready: {process.poll()}"
            assert manager.recv(100) == b"READY=1"
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == ExitStatus.CLEAN
        finally:
            process.kill()
            process.wait()
