"""Real control groups with a limit of memory, where this machine lets a test make one."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from quartet.runtime.process import control_group
from quartet.runtime.process.control_group import Directory

LIMIT_FILE = {1: "memory.limit_in_bytes", 2: "memory.max"}
EMPTY_WITHIN_S = 10


@dataclass(frozen=True)
class Group:
    """A group of ours, and where this process was before."""

    path: Path
    home: Path

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """What is started inside belongs to the group."""
        move(os.getpid(), self.path)
        try:
            yield
        finally:
            move(os.getpid(), self.home)

    @property
    def killed(self) -> int:
        """How many processes the kernel has ended for want of memory."""
        group = Directory(self.path, 0, "")
        return group.entry("memory.oom_control", "oom_kill") + group.entry("memory.events", "oom_kill")


def move(pid: int, group: Path) -> None:
    (group / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def limited(size: int) -> Iterator[Group]:
    """A group below this process's own, or beside it, that may use so many bytes; skips the test where none can be."""
    found = control_group.directories("memory")
    reasons = [] if found else ["no control group limits memory"]
    for parent in found[:2]:
        path = parent.path / f"quartet-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError as error:
            reasons.append(f"{parent.path}: {error.strerror}")
            continue
        try:
            (path / LIMIT_FILE[parent.version]).write_text(str(size))
            group = Group(path, found[0].path)
            with group.joined():
                pass
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
            path.rmdir()
            continue
        try:
            yield group
        finally:
            remove(path)
        return
    pytest.skip(f"no control group can be made here ({'; '.join(reasons)})")


def remove(path: Path) -> None:
    """Take the group away once its processes have ended."""
    deadline = time.monotonic() + EMPTY_WITHIN_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            path.rmdir()
            return
        time.sleep(0.05)
    path.rmdir()
