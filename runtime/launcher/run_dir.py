"""The private directory of one boot: sockets and boot files live here and leave no trace.

The launcher holds a lock in it for life, so that a directory without a holder is known to be left over. A tiny shell
process, the janitor, waits at the lifeline pipe: it removes the directory when the launcher is gone, however it went.

A program that starts servers (`runtime.api.server`) has a directory for each, with its log, and locks it likewise.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from quartet.runtime.errors import StartupError

log = logging.getLogger(__name__)

PREFIX = "quartet-"
SERVER_PREFIX = PREFIX + "server-"  # of a program that has started the server
NAME = re.compile(f"({PREFIX}|{SERVER_PREFIX})[0-9a-f]{{8}}")  # anything else that begins alike is not ours to remove
LOCK = "lock"
# `read` returns at end of file. A socket that appears during `rm` makes it fail, so it is tried again.
JANITOR = 'trap "" INT TERM HUP; read -r _; n=0; until rm -rf -- "$1" || [ $((n+=1)) -ge 100 ]; do sleep 0.01; done'


def base(environment: Mapping[str, str]) -> Path:
    """Where run directories go: short, local and private if possible."""
    runtime_dir = environment.get("XDG_RUNTIME_DIR", "")
    usable = runtime_dir and os.path.isdir(runtime_dir) and os.access(runtime_dir, os.W_OK | os.X_OK)
    return Path(runtime_dir if usable else "/tmp")


@contextlib.contextmanager
def private(parent: Path) -> Iterator[tuple[Path, int]]:
    """Make a run directory and sweep those of dead boots. Yields it and the read end of the lifeline pipe."""
    sweep(parent)
    try:
        run_dir, lock = locked(parent, PREFIX)
    except OSError as error:
        raise StartupError(f"cannot make a run directory in {parent}: {error.strerror}; set XDG_RUNTIME_DIR") from error
    try:
        with watched(run_dir) as lifeline_fd:
            yield run_dir, lifeline_fd
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
        os.close(lock)


def locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a directory that is removed by the next sweep once its lock is let go. Raises OSError."""
    name = prefix + secrets.token_hex(4)
    hidden = parent / f".{name}"
    try:
        hidden.mkdir(mode=0o700)
        lock = take_lock(hidden)
        assert lock is not None, hidden  # nobody else knows of it
        return hidden.rename(parent / name), lock  # only now may a sweep see it
    except OSError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


@contextlib.contextmanager
def watched(run_dir: Path) -> Iterator[int]:
    """Have a janitor remove the directory whatever happens here. Yields the read end of the lifeline pipe."""
    lifeline_read, lifeline_write = os.pipe2(os.O_CLOEXEC)
    janitor = None
    try:
        janitor = hire_janitor(run_dir, lifeline_read)
        yield lifeline_read
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)  # before the janitor does, which takes its time
        os.close(lifeline_write)
        os.close(lifeline_read)
        if janitor is not None:
            janitor.wait()


def hire_janitor(run_dir: Path, lifeline_fd: int) -> subprocess.Popen[bytes]:
    """Start a process that removes the directory when this one has ended, however it ends."""
    return subprocess.Popen(
        ["quartet::janitor", "-c", JANITOR, "quartet::janitor", str(run_dir)],
        executable="/bin/sh",
        stdin=lifeline_fd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        process_group=0,
    )


def sweep(parent: Path) -> None:
    """Remove the directories of launchers that are dead and had no janitor left, and of programs that are dead."""
    for left_over in parent.glob(f"{PREFIX}*"):
        try:
            if not is_run_directory(left_over):
                continue
            lock = take_lock(left_over)
        except OSError:  # gone meanwhile, or not ours
            continue
        if lock is not None:
            log.info("removing the left-over directory %s", left_over)
            shutil.rmtree(left_over, ignore_errors=True)
            os.close(lock)


def is_run_directory(path: Path) -> bool:
    """A directory that a launcher or program of this user has made: by name, owner and lock file."""
    ours = NAME.fullmatch(path.name) and not path.is_symlink() and path.stat().st_uid == os.geteuid()
    return bool(ours) and (path / LOCK).is_file()


def take_lock(directory: Path) -> int | None:
    """The lock of a run directory, or None when its launcher lives."""
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
