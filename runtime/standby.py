"""A process that stands by for a service: `python -m quartet.runtime.standby <the service's module>`.

Its imports take seconds of a core while others serve, so they run in a thread of the lowest priority. The main thread
keeps its own, with which the service runs later: only root may raise one again. Where the boot file comes before the
imports are done, which may take minutes while others use all cores, they begin anew with the main thread's priority.
"""

import contextlib
import importlib
import os
import select
import sys
import threading
from typing import NoReturn

import setproctitle

from quartet.runtime import service
from quartet.runtime.process.priority import NICEST, give_way


def import_without_haste(module: str, done_fd: int) -> None:
    """Import a module with the lowest priority, and say so; what is wrong with it shows where it is imported again."""
    give_way(NICEST)
    try:
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    finally:
        os.eventfd_write(done_fd, 1)


def is_wanted_before(done_fd: int) -> bool:
    """Wait for the end of the imports. Returns at once, and True, when a boot file is named before."""
    poll = select.poll()
    poll.register(done_fd, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)
    while not (happened := dict(poll.poll())).get(done_fd):
        if happened[sys.stdin.fileno()] & select.POLLIN:
            return True
        poll.unregister(sys.stdin)  # nobody will name one
    return False


def main(module: str) -> NoReturn:
    """Import the service's module, wait for the boot file, and be that service."""
    setproctitle.setproctitle(service.TITLE.format(role=service.STANDBY))
    done_fd = os.eventfd(0)
    imports = threading.Thread(target=import_without_haste, args=(module, done_fd), name="imports")
    imports.start()
    if is_wanted_before(done_fd):  # the service's own process would have been started so
        os.execve(sys.executable, [sys.executable, "-P", "-m", module], os.environ)
    imports.join()
    os.close(done_fd)
    service.run(importlib.import_module(module).main)


if __name__ == "__main__":
    main(sys.argv[1])
