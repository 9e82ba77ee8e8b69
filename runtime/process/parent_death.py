"""A process that ends with the one that started it. Imports little: children arm this before anything slow."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)  # loaded here, for arm_death_signal runs between fork and exec


def arm_death_signal(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that forked it ends. Call from the main thread."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the signal was armed
        os._exit(1)
