"""Long work beside the loop: in a thread of low priority, while the steps go on.

A step on the CPU takes and drops the interpreter's lock hundreds of times. Each time it would wait up to the switch
interval for a thread that runs Python code, so that interval is made short here; and what runs beside leaves the
cores to the steps: it has a lower priority. Work on tensors must itself see to it that it uses one thread
(`scheduler_service/weights/update.py`); nothing here loads torch. It touches nothing that serves, so what goes wrong
in it is the command's affair alone.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TypeVar

from runtime.errors import CommandRefused

log = logging.getLogger(__name__)

Result = TypeVar("Result")

NICE = 5
SWITCH_INTERVAL_S = 0.0002


def beside(work: Callable[[], Result]) -> Generator[None, None, Result]:
    """Start `work` in a thread of its own; yields until it has ended, then returns what it did.

    Raises its CommandRefused, and one with status 500 for any other exception.
    """
    done: Future[Result] = Future()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    threading.Thread(target=_run, args=(work, done), name="beside", daemon=True).start()
    while not done.done():
        yield
    try:
        return done.result()
    except CommandRefused:
        raise
    except Exception as error:
        log.exception("a command failed")
        raise CommandRefused(f"Internal error: {type(error).__name__}: {error}", 500) from error


def _run(work: Callable[[], Result], done: "Future[Result]") -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    try:
        result = work()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)
