"""Whether this system has what a server stands on."""

import errno
import os
import platform
import sys

from quartet.runtime.errors import StartupError

CALLS = ("pidfd_open", "pipe2", "sched_getaffinity")
ELSEWHERE = (
    "a server needs Linux, and this is {}; run it in a container (docker build -f deploy/Dockerfile -t quartet .) or "
    "in a virtual machine with Linux; commands that talk to a running server work here"
)
TOO_OLD = "a server needs pidfd_open, which this {} does not have (Linux 5.3 and newer do); use a newer kernel"
NAMES = {"darwin": "macOS"}


def check_system() -> None:
    """Raise StartupError where a server cannot run: it watches its processes with calls that only Linux has."""
    if sys.platform != "linux":
        raise StartupError(ELSEWHERE.format(NAMES.get(sys.platform, sys.platform)))
    if missing := [call for call in CALLS if not hasattr(os, call)]:
        raise StartupError(f"a server needs os.{missing[0]}, which this Python was built without; use another Python")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise StartupError(TOO_OLD.format(f"{platform.system()} {platform.release()}")) from error
