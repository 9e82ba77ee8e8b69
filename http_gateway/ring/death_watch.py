"""Sees the end of a process at once, through its pidfd, as the launcher does."""

import asyncio
import os
from collections.abc import Callable


def watch(pid: int, on_end: Callable[[], None]) -> None:
    """Have the running event loop call `on_end` when the process ends, or soon where it has ended already."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        loop.call_soon(on_end)
        return

    def ended() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        on_end()

    loop.add_reader(descriptor, ended)
