"""Standard streams that may be closed, full or left by their readers, and the limits that a start depends on.

A server must not care who listens: what cannot be written is lost, and nothing ends because of it. A command whose
output is its purpose ends with a status that says so.
"""

import contextlib
import errno
import os
import resource
import sys
from typing import TextIO

from quartet.runtime.errors import StartupError

STANDARD = (0, 1, 2)
LEAST_OPEN_FILES = 48  # the gateway has 30 when nobody is connected

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the whole machine has too many files open",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.ENOSPC: "free some space, or name another directory with XDG_RUNTIME_DIR",
    errno.EDQUOT: "free some space, or name another directory with XDG_RUNTIME_DIR",
    errno.EROFS: "name a directory that can be written to with XDG_RUNTIME_DIR",
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.ENOMEM: "free some memory",
}


def keep_standard() -> None:
    """Open /dev/null in the place of standard streams that are closed; else sockets would get their numbers."""
    for descriptor in STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == descriptor, (opened, descriptor)
            os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)  # None where it was closed
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def give_up(stream: TextIO) -> None:
    """Have a stream that nobody can read any more lead to /dev/null, so that it fails no more, not even at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def is_of_output(error: OSError) -> bool:
    """Whether something was printed and there is no room for it."""
    return error.filename is None and error.errno in NO_ROOM


def settle() -> None:
    """Write out what is left in the standard streams; call it last."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            give_up(stream)


def check_open_files() -> None:
    """Raise StartupError where fewer files may be open than a server needs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < LEAST_OPEN_FILES:
        raise StartupError(
            f"only {limit} files may be open; raise the limit to at least {LEAST_OPEN_FILES} (ulimit -n)"
        )


def cause(error: BaseException) -> str:
    """What the system refused, and what to do about it, in one line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    number, text = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    named = f"{text}: {name}" if (name := getattr(error, "filename", None)) else text
    return f"{named}; {REMEDIES[number]}" if number in REMEDIES else named
