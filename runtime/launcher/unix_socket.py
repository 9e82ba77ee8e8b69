"""The Unix socket of --uds: private to the user, taken over from a server that has died, never from one that lives."""

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from quartet.runtime.errors import StartupError

BACKLOG = 2048
PRIVATE_SOCKET, PRIVATE_DIRECTORY = 0o600, 0o700
MOST_PATH_BYTES = 107
CONNECT_TIMEOUT_S = 1.0
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@contextlib.contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    """Listen on a Unix socket, and remove it at the end. Raises StartupError naming --uds.

    A missing directory is made, for this user alone; the socket too is for this user alone.
    """
    place = Path(path).absolute()
    if len(os.fsencode(place)) > MOST_PATH_BYTES:
        raise StartupError(f"--uds {path} is longer than the {MOST_PATH_BYTES} bytes that a socket's path may have")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            place.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
            remove_left_over(place)
            bind_privately(listener, place)
            listener.listen(BACKLOG)
            ours = identity(place)
        except OSError as error:
            raise StartupError(f"cannot listen on --uds {path}: {error.strerror or error}") from error
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if identity(place) == ours:  # another server may have put its own there
                    place.unlink()


def bind_privately(listener: socket.socket, place: Path) -> None:
    before = os.umask(0o777 & ~PRIVATE_SOCKET)  # a socket that is made open is open for a moment
    try:
        listener.bind(str(place))
    finally:
        os.umask(before)


def identity(place: Path) -> tuple[int, int]:
    found = place.lstat()
    return found.st_dev, found.st_ino


def remove_left_over(place: Path) -> None:
    """Remove the socket of a server that has died. Raises StartupError where it lives, or where it is no socket."""
    try:
        mode = place.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartupError(f"--uds {place} is there and is no socket; remove it or choose another path")
    if owner := listener_of(place):
        raise StartupError(f"{owner} listens on --uds {place}; stop it or choose another path")
    place.unlink(missing_ok=True)


def listener_of(place: Path) -> str:
    """Who listens on a socket, in words; empty where nobody does. Raises OSError where that cannot be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(place))
        except (ConnectionRefusedError, FileNotFoundError):
            return ""
        except (TimeoutError, BlockingIOError):  # its queue is full
            return "a process that accepts no connections"
        if not hasattr(socket, "SO_PEERCRED"):  # Linux alone tells
            return "another process"
        pid, _, _ = CREDENTIALS.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return f"{name_of(pid)} (pid {pid})" if pid else "another process"


def name_of(pid: int) -> str:
    """A process as `ps` names it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "another process"
    return " ".join(word.decode(errors="replace") for word in words[:3]).strip() or "another process"
