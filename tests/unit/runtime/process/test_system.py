"""Systems that cannot run a server say so in one line, and everything else of Quartet works there."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.process.system import CALLS, check_system

ROOT = Path(__file__).resolve().parents[4]
AS_ON_MACOS = """
import os, select, sys
for call in ("pidfd_open", "pipe2", "sched_getaffinity", "memfd_create", "eventfd"):
    if hasattr(os, call):
        delattr(os, call)
del select.epoll
sys.platform = "darwin"
from quartet.runtime.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_this_system_runs_a_server():
    check_system()


@pytest.mark.parametrize(("platform", "said"), [("darwin", "this is macOS"), ("freebsd14", "this is freebsd14")])
def test_another_system_is_named_with_the_way_out(monkeypatch, platform, said):
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(StartupError, match=f"needs Linux, and {said}; run it in a container"):
        check_system()


@pytest.mark.parametrize("call", CALLS)
def test_a_python_without_a_call_is_refused_by_its_name(monkeypatch, call):
    monkeypatch.delattr(os, call)
    with pytest.raises(StartupError, match=f"needs os.{call}"):
        check_system()


def test_a_kernel_that_is_too_old_is_refused_with_the_version_that_will_do(monkeypatch):
    def refused(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused)
    with pytest.raises(StartupError, match=r"Linux 5\.3 and newer do"):
        check_system()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("serve", "--port", "0"), 64, "quartet: a server needs Linux, and this is macOS"),
        (("--help",), 0, "usage: quartet"),
        (("config", "show"), 0, "model_path"),
    ],
)
def test_without_the_calls_of_linux_only_a_server_is_refused(words, status, said):
    ran = subprocess.run(
        [sys.executable, "-c", AS_ON_MACOS, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, "Traceback" in ran.stderr) == (status, False), ran.stderr
    assert said in ran.stdout + ran.stderr
    assert status == 0 or len(ran.stderr.splitlines()) == 1
