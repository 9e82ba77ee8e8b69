"""Ends the launcher when the program that started it ends, however that ends (`--exit-with-parent`).

A descriptor of the parent process (pidfd) is waited for by a thread. The kernel's own parent-death signal will not do:
it comes when the *thread* that started the launcher ends, though its program lives on, and it is silent where a shell
stands between the two. So shells are seen through: beside a parent that is one, its parent is watched, and so on.

A program that dies before the launcher has looked leaves it to another parent. Whoever passes a process id, its own as
a rule, is safe from that: a process that is no ancestor any more has ended.
"""

import logging
import os
import select
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from quartet.runtime.errors import StartupError
from quartet.runtime.process.vitals import fields_of

log = logging.getLogger(__name__)

DIRECT = 0  # the parent, whoever it is
INIT = 1
SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "fish", "busybox"}
GONE = "--exit-with-parent: {}, so there is nobody to serve for"


def exit_with_parent(given: int) -> None:
    """Send this process SIGTERM when its parent, or the ancestor of this id, ends. Raises StartupError."""
    watched = to_watch(given, ancestors(os.getpid()))
    try:
        descriptors = [os.pidfd_open(pid) for pid in watched]
    except ProcessLookupError:
        raise StartupError(GONE.format("the parent has ended")) from None
    if not set(watched) <= set(ancestors(os.getpid())):  # it ended meanwhile, and the id may be another's
        raise StartupError(GONE.format("the parent has ended"))
    threading.Thread(target=wait_for, args=(descriptors,), name="parent", daemon=True).start()


def wait_for(descriptors: Sequence[int]) -> None:
    """Wait until one of these processes has ended, and ask this one to stop."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll()
    log.warning("The parent process has ended; stopping (--exit-with-parent).")
    os.kill(os.getpid(), signal.SIGTERM)


def to_watch(given: int, chain: Sequence[int]) -> list[int]:
    """The ancestors whose end is the launcher's. `chain`: all of them, the parent first. Raises StartupError."""
    if given != DIRECT:
        if given not in chain:
            raise StartupError(GONE.format(f"process {given} is no ancestor of this one (any more)"))
        return list(chain[: chain.index(given) + 1])
    watched = []
    for pid in chain:
        if pid == INIT:
            break
        watched.append(pid)
        if name_of(pid) not in SHELLS:
            break
    if not watched:
        log.warning("--exit-with-parent has no effect: the parent is process 1, with which everything ends.")
    return watched


def ancestors(pid: int) -> list[int]:
    """The parent of a process, its parent, and so on, as far as they can be seen."""
    found = []
    while (pid := parent_of(pid)) > 0:
        found.append(pid)
    return found


def parent_of(pid: int) -> int:
    """0 where there is none, or none that can be seen from this container."""
    try:
        return int(_stat(pid)[1][1])
    except OSError:
        return 0


def name_of(pid: int) -> str:
    """The name of a process's program; empty when it has ended."""
    try:
        return _stat(pid)[0].lstrip("-")  # of a login shell
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, list[str]]:
    return fields_of(Path("/proc") / str(pid))
