"""Commands that join and leave the process groups in which trainers broadcast weights."""

from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from quartet.runtime.control import ControlCommand, DestroyWeightsUpdateGroup, InitWeightsUpdateGroup
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message, Reply
from quartet.scheduler_service.control.weights import updates_of
from quartet.scheduler_service.host.background import run_in_background

if TYPE_CHECKING:
    from quartet.scheduler_service.scheduler import Scheduler

Waiting = Generator[None, bool | None, list[Message]]

JOINED = "Succeeded to initialize custom process group."
LEFT = "Succeeded to destroy custom process group."
UNKNOWN = "The group to be destroyed does not exist."


def init(scheduler: "Scheduler", command: InitWeightsUpdateGroup) -> Waiting:
    """Meet the trainer, in the background. It may come later than this call."""
    updates = updates_of(scheduler)
    yield from run_in_background(partial(updates.join_group, command))
    return [Reply(id=command.id, message=JOINED)]


def destroy(scheduler: "Scheduler", command: DestroyWeightsUpdateGroup) -> Waiting:
    updates = updates_of(scheduler)
    if command.group_name not in updates.groups:
        raise CommandRefused(UNKNOWN)
    yield from run_in_background(partial(updates.leave_group, command.group_name))
    return [Reply(id=command.id, message=LEFT)]


HANDLERS: dict[type[ControlCommand], Callable[["Scheduler", Any], Any]] = {
    InitWeightsUpdateGroup: init,
    DestroyWeightsUpdateGroup: destroy,
}
