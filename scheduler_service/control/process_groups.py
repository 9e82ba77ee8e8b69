"""Commands that join and leave the process groups in which trainers broadcast weights."""

from collections.abc import Iterator
from contextlib import contextmanager
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
NOT_JOINED = "Failed to initialize custom process group: the group {} {}."
UNKNOWN = "The group to be destroyed does not exist."
BEING_DESTROYED = "The group {} is being destroyed already."


def init(context: Context, command: InitWeightsUpdateGroup) -> Resumable:
    """Join the group in the background. The trainer may join it after this call.

    Raises CommandRefused where there is one of that name, or an earlier call joins or leaves it still: two members of
    one rank would spoil the group of both.
    """
    updates, name = updates_of(context), command.group_name
    if name in updates.joining:
        raise CommandRefused(NOT_JOINED.format(short(name), "is being joined already"))
    if name in updates.leaving:
        raise CommandRefused(NOT_JOINED.format(short(name), "is being destroyed"))
    if name in updates.groups:
        raise CommandRefused(NOT_JOINED.format(short(name), "exists already"))
    with noted(updates.joining, name):
        yield from run_in_background(partial(updates.join_group, command))
    return [Reply(id=command.id, message=JOINED)]


def destroy(context: Context, command: DestroyWeightsUpdateGroup) -> Resumable:
    """Leave the group in the background. Raises CommandRefused where there is none, or an earlier call leaves it."""
    updates, name = updates_of(context), command.group_name
    if name in updates.leaving:
        raise CommandRefused(BEING_DESTROYED.format(short(name)))
    if name not in updates.groups or name in updates.joining:
        raise CommandRefused(UNKNOWN)
    with noted(updates.leaving, name):
        yield from run_in_background(partial(updates.leave_group, name))
    return [Reply(id=command.id, message=LEFT)]


@contextmanager
def noted(under_way: set[str], name: str) -> Iterator[None]:
    """Within it, the group's name is among those under way."""
    under_way.add(name)
    try:
        yield
    finally:
        under_way.discard(name)


HANDLERS: dict[type[ControlCommand], Handler] = {
    InitWeightsUpdateGroup: init,
    DestroyWeightsUpdateGroup: destroy,
}
