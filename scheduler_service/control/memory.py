"""Commands that release memory for a while and allocate it again."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from quartet.runtime.control import ControlCommand, ReleaseMemory, ResumeMemory
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message, Reply
from quartet.scheduler_service.control.agreement import agreed
from quartet.scheduler_service.control.context import Context, Handler, Resumable

if TYPE_CHECKING:  # loads torch; the object comes with the scheduler
    from quartet.scheduler_service.execution.memory_saver import MemorySaver

log = logging.getLogger(__name__)

Act = Callable[[Context, Any], list[Message]]

OFF = "Memory cannot be released: start the server with --enable-memory-saver."
BUSY = "Memory cannot be released while requests run: wait for them, abort them or pause with the mode retract."
CHANGING = "Memory cannot be released while the weights are being changed."
FAILED = "Memory cannot be {}: {}."


def saver_of(context: Context) -> "MemorySaver":
    if context.saver is None:
        raise CommandRefused(OFF)
    return context.saver


def release(context: Context, command: ReleaseMemory) -> list[Message] | Resumable:
    """Release the memory of these tags. Refused while requests run or weights change."""
    check_unused(context)
    if command.waits_for_others:
        return release_together(context, command)
    return once_ranks_are_free(context, command, release_now)


def once_ranks_are_free(context: Context, command: ControlCommand, act: Act) -> list[Message] | Resumable:
    """Act at once, or at the first turn of the loop at which all ranks are free; steps go on meanwhile."""
    saver = saver_of(context)

    def act_later() -> Resumable:
        while saver.must_wait:
            yield
        return act(context, command)

    return act_later() if saver.must_wait else act(context, command)


def release_together(context: Context, command: ReleaseMemory) -> Resumable:
    """Release it once all schedulers can; no request begins while they are asked."""
    while saver_of(context).must_wait:  # steps go on
        yield
    check_unused(context)
    context.planner.asleep = True
    try:
        yield from agreed(context, command)
        while saver_of(context).must_wait:
            yield
    finally:
        context.pause_without_memory()
    return release_now(context, command)


def check_unused(context: Context) -> None:
    saver_of(context)
    if context.planner.running or context.launched:
        raise CommandRefused(BUSY)
    if context.updates is not None and (context.updates.commands or context.updates.session):
        raise CommandRefused(CHANGING)


def release_now(context: Context, command: ReleaseMemory) -> list[Message]:
    """Release it between two steps."""
    check_unused(context)
    saver = saver_of(context)
    try:
        with refused_on_failure("released"):
            saver.release(command.tags)
    finally:
        if saver.holds_kv_cache:
            context.planner.forget_prefixes(keep_tier=True)
        context.pause_without_memory()
    return report(context, command, "released")


def resume(context: Context, command: ResumeMemory) -> list[Message] | Resumable:
    """Take the memory of these tags again."""
    return once_ranks_are_free(context, command, resume_now)


def resume_now(context: Context, command: ResumeMemory) -> list[Message]:
    """Take it between two steps."""
    saver = saver_of(context)
    try:
        with refused_on_failure("resumed"):
            saver.resume(command.tags)
    finally:
        context.pause_without_memory()
    return report(context, command, "resumed")


@contextlib.contextmanager
def refused_on_failure(what: str) -> Iterator[None]:
    """Turn a failure into a refusal: if a trainer holds the memory, the scheduler goes on, and the client can retry."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # torch raises RuntimeError
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise CommandRefused(FAILED.format(what, reason), 503) from error


def report(context: Context, command: ControlCommand, what: str) -> list[Message]:
    released = sorted(saver_of(context).released)
    log.info("Memory occupation %s. Still released: %s", what, ", ".join(released) or "nothing")
    return [Reply(id=command.id, body=context.memory_state())]


HANDLERS: dict[type[ControlCommand], Handler] = {
    ReleaseMemory: release,
    ResumeMemory: resume,
}
