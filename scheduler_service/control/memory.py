"""Commands that give memory back for a while and take it again."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from quartet.runtime.control import ControlCommand, ReleaseMemory, ResumeMemory
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message, Reply

if TYPE_CHECKING:  # loads torch; the object comes with the scheduler
    from quartet.scheduler_service.execution.memory_saver import MemorySaver
    from quartet.scheduler_service.scheduler import Scheduler

log = logging.getLogger(__name__)

OFF = "Memory cannot be released: start the server with --enable-memory-saver."
BUSY = "Memory cannot be released while requests run: wait for them, abort them or pause with the mode retract."
CHANGING = "Memory cannot be released while the weights are being changed."
FAILED = "Memory cannot be {}: {}."


def saver_of(scheduler: "Scheduler") -> "MemorySaver":
    if scheduler.saver is None:
        raise CommandRefused(OFF)
    return scheduler.saver


def release(scheduler: "Scheduler", command: ReleaseMemory) -> list[Message]:
    saver = saver_of(scheduler)
    if scheduler.planner.running or scheduler.in_flight:
        raise CommandRefused(BUSY)
    if scheduler.updates is not None and (scheduler.updates.turns or scheduler.updates.session):
        raise CommandRefused(CHANGING)
    try:
        with told("released"):
            saver.release(command.tags)
    finally:
        if saver.holds_kv_cache:
            scheduler.planner.forget_prefixes()
        scheduler.look_at_memory()
    return report(scheduler, command, "released")


def resume(scheduler: "Scheduler", command: ResumeMemory) -> list[Message]:
    saver = saver_of(scheduler)
    try:
        with told("resumed"):
            saver.resume(command.tags)
    finally:
        scheduler.look_at_memory()
    return report(scheduler, command, "resumed")


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """A trainer that holds the memory is no reason for the scheduler to end: what was not done can be asked again."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # torch says RuntimeError
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise CommandRefused(FAILED.format(what, reason), 503) from error


def report(scheduler: "Scheduler", command: ControlCommand, what: str) -> list[Message]:
    released = sorted(saver_of(scheduler).released)
    log.info("Memory occupation %s. Still released: %s", what, ", ".join(released) or "nothing")
    return [Reply(id=command.id, body=scheduler.sleep())]


HANDLERS: dict[type[ControlCommand], Callable[["Scheduler", Any], Any]] = {
    ReleaseMemory: release,
    ResumeMemory: resume,
}
