"""Changes that all schedulers make or none: each prepares, tells the gateway, and waits for its decision."""

from collections.abc import Generator

from quartet.runtime.control import ControlCommand, DecideChange
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message, Prepared
from quartet.scheduler_service.control.context import Context, Handler

SAY_AGAIN_S = 1.0  # what was said, or its answer, may be lost with a process of the ring
NOT_ALL = 503  # status of a change that another scheduler did not make


def agreed(context: Context, command: ControlCommand, weight_files: str = "") -> Generator[None, bool | None, str]:
    """Return once every scheduler is prepared for the change. Raises CommandRefused where one is not.

    `weight_files`: what was read, of new weights; all must have read the same.
    Returns the version that the weights of all have then; "" where there are no others.
    """
    if not command.waits_for_others:
        return ""
    said_at = -SAY_AGAIN_S
    while (word := context.decisions.of(command.id)) is None:
        if context.now - said_at >= SAY_AGAIN_S:
            context.emit([Prepared(id=command.id, weight_files=weight_files)])
            said_at = context.now
        yield
    if word.reason:
        raise CommandRefused(word.reason, NOT_ALL)
    return word.weight_version


def decide(context: Context, command: DecideChange) -> list[Message]:
    context.decisions.note(command)
    return []


HANDLERS: dict[type[ControlCommand], Handler] = {DecideChange: decide}
