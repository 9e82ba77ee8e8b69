"""The priority of threads that work in the background."""

import os
import threading

NICE_BY = 5  # more than the steps
NICEST = 19


def give_way(by: int = NICE_BY) -> None:
    """Give this thread a lower priority than that of the steps, which it has so far; by NICEST: the lowest.

    Relative to what it has: only root may raise a priority, and the server may have been started with a low one.
    """
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, min(NICEST, os.getpriority(os.PRIO_PROCESS, thread) + by))
