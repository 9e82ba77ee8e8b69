"""A process that stands by for a service: `python -m quartet.runtime.standby <the service's module>`.

Its imports take seconds of a core while others serve, so they run in a thread of the lowest priority. The main thread
keeps its own, with which the service runs later: only root may raise one again.
"""

import contextlib
import importlib
import os
import sys
import threading
from typing import NoReturn

import setproctitle

from quartet.runtime import service

NICEST = 19


def import_without_haste(module: str) -> None:
    """Import a module with the lowest priority; what is wrong with it shows where it is imported again."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICEST)
    with contextlib.suppress(Exception):
        importlib.import_module(module)


def main(module: str) -> NoReturn:
    """Import the service's module, wait for the boot file, and be that service."""
    setproctitle.setproctitle(service.TITLE.format(role=service.STANDBY))
    imports = threading.Thread(target=import_without_haste, args=(module,), name="imports")
    imports.start()
    imports.join()
    service.run(importlib.import_module(module).main)


if __name__ == "__main__":
    main(sys.argv[1])
