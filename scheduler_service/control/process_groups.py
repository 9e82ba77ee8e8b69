"""Commands that join and leave the process groups in which trainers broadcast weights."""

from functools import partial

from quartet.runtime.control import ControlCommand, DestroyWeightsUpdateGroup, InitWeightsUpdateGroup
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Reply
from quartet.runtime.shorten import short
from quartet.scheduler_service.control.context import Context, Handler, Resumable
from quartet.scheduler_service.control.weights import updates_of
from quartet.scheduler_service.host.background import run_in_background

JOINED = "Succeeded to initialize custom process group."
LEFT = "Succeeded to destroy custom process group."
BEING_JOINED = "Failed to initialize custom process group: the group {} is being joined already."
UNKNOWN = "The group to be destroyed does not exist."


def init(context: Context, command: InitWeightsUpdateGroup) -> Resumable:
    """Join the group in the background. The trainer may join it after this call.

    Raises CommandRefused where an earlier call joins it still: two members of one rank would spoil the group of both.
    """
    updates, name = updates_of(context), command.group_name
    if name in updates.joining:
        raise CommandRefused(BEING_JOINED.format(short(name)))
    updates.joining.add(name)
    try:
        yield from run_in_background(partial(updates.join_group, command))
    finally:
        updates.joining.discard(name)
    return [Reply(id=command.id, message=JOINED)]


def destroy(context: Context, command: DestroyWeightsUpdateGroup) -> Resumable:
    updates = updates_of(context)
    if command.group_name not in updates.groups:
        raise CommandRefused(UNKNOWN)
    yield from run_in_background(partial(updates.leave_group, command.group_name))
    return [Reply(id=command.id, message=LEFT)]


HANDLERS: dict[type[ControlCommand], Handler] = {
    InitWeightsUpdateGroup: init,
    DestroyWeightsUpdateGroup: destroy,
}
