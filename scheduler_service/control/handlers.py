"""Control commands: one function each, found by the command's type.

A handler takes the scheduler as a `Context`, and the command; it returns the messages to send on, a Reply as a rule.
One that needs several steps is a generator: it is resumed once a step and returns its messages at the end. A refusal is
`CommandRefused`. Each subject has a file of its own; the other commands are here.
"""

import logging
from collections.abc import Iterable

from quartet.runtime.control import Abort, ControlCommand, FlushCache, Probe
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message, Reply, Request
from quartet.scheduler_service.control import (
    adapters,
    agreement,
    experts,
    memory,
    pause,
    process_groups,
    profile,
    weights,
)
from quartet.scheduler_service.control.context import Context, Handler, Resumable

log = logging.getLogger(__name__)

FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
FLUSH_FAILED = "Flush cache failed.\n"
FLUSH_TIMED_OUT = "Timed out waiting for idle state."
FLUSH_IN_PROGRESS = "Another flush_cache is already in progress."


def abort(context: Context, command: Abort) -> list[Message]:
    """End the requests that the command selects. There is no reply: each request ends with its own last message."""
    rids = selected_rids(command, [request.rid for request in context.requests if is_known_attempt(command, request)])
    return [message for rid in rids for message in context.abort(rid, command.abort_message)]


def is_known_attempt(command: Abort, request: Request) -> bool:
    """Whether the command was sent after this attempt of the request; later attempts go on."""
    return command.attempt is None or request.attempt <= command.attempt


def selected_rids(command: Abort, live: Iterable[str]) -> list[str]:
    """The live rids that an Abort selects: all, those with a prefix, or one rid and the `rid_<i>` of its batch."""
    if command.abort_all:
        return list(live)
    if not command.rid:
        log.warning("ignored an abort without a rid")
        return []
    if command.exact:
        return [rid for rid in live if rid == command.rid]
    if command.prefix:
        return [rid for rid in live if rid.startswith(command.rid)]
    child = command.rid + "_"
    return [rid for rid in live if rid == command.rid or (rid.startswith(child) and rid[len(child) :].isdecimal())]


def flush_cache(context: Context, command: FlushCache) -> Resumable:
    """Clear the prefix cache once no request runs or waits, or all are paused. Refused after the command's timeout."""
    planner, deadline = context.planner, context.now + command.timeout
    if context.has_unfinished(FlushCache):
        raise CommandRefused(FLUSH_IN_PROGRESS)
    while not (planner.idle or planner.paused):
        if context.now >= deadline:
            log.info(
                "Cache not flushed because there are pending requests. #queue-req: %d, #running-req: %d",
                len(planner.waiting),
                len(planner.running),
            )
            raise CommandRefused(FLUSH_TIMED_OUT if command.timeout > 0 else FLUSH_FAILED)
        yield
    planner.forget_prefixes()
    log.info("Cache flushed successfully!")
    return [Reply(id=command.id, message=FLUSHED)]


def probe(context: Context, command: Probe) -> list[Message]:
    """Add this service's counters and send the probe on."""
    command.counters["scheduler"] = context.counters()
    return [command]


HANDLERS: dict[type[ControlCommand], Handler] = {
    Abort: abort,
    FlushCache: flush_cache,
    Probe: probe,
    **agreement.HANDLERS,
    **experts.HANDLERS,
    **weights.HANDLERS,
    **process_groups.HANDLERS,
    **pause.HANDLERS,
    **profile.HANDLERS,
    **memory.HANDLERS,
    **adapters.HANDLERS,
}
