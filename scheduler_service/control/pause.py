"""Commands that stop generation for a while, in one of three ways, and let it go on; and two aids for tests."""

import gc
import logging
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from quartet.runtime.control import Abort, ContinueGeneration, ControlCommand, FreezeGarbage, PauseGeneration, SlowDown
from quartet.runtime.messages import Message, Reply

if TYPE_CHECKING:
    from quartet.scheduler_service.scheduler import Scheduler

log = logging.getLogger(__name__)

Waiting = Generator[None, bool | None, list[Message]]

PAUSED = "Generation paused successfully."
CONTINUED = "Generation continued successfully."


def pause(scheduler: "Scheduler", command: PauseGeneration) -> Waiting:
    """Plan nothing from now on. Answered when no step is outstanding; the same answer again when paused already.

    A command to go on that comes before that answer ends the wait, and the answer says that nothing is paused.
    """
    planner = scheduler.planner
    planner.paused = True
    if command.mode == "abort":
        aborted = scheduler.control.handlers[Abort](scheduler, Abort(abort_all=True))
        assert isinstance(aborted, list)
        scheduler.emit(aborted)
    elif command.mode == "retract":
        planner.retract_all()
    while scheduler.in_flight and planner.paused:
        yield
    scheduler.forget_released()
    log.info("Generation paused (%s). #running-req: %d, #queue-req: %d", command.mode, *census(scheduler))
    return [Reply(id=command.id, message=PAUSED, body={"paused": planner.paused})]


def census(scheduler: "Scheduler") -> tuple[int, int]:
    return len(scheduler.planner.running), len(scheduler.planner.waiting)


def go_on(scheduler: "Scheduler", command: ContinueGeneration) -> list[Message]:
    scheduler.planner.paused = False
    log.info("Generation continued. #running-req: %d, #queue-req: %d", *census(scheduler))
    return [Reply(id=command.id, message=CONTINUED, body={"paused": False})]


def freeze_garbage(scheduler: "Scheduler", command: FreezeGarbage) -> list[Message]:
    gc.freeze()
    return [Reply(id=command.id, message="Garbage collection frozen.\n")]


def slow_down(scheduler: "Scheduler", command: SlowDown) -> list[Message]:
    scheduler.step_sleep_s = max(0.0, command.forward_sleep_time or 0.0)
    return [Reply(id=command.id)]


HANDLERS: dict[type[ControlCommand], Callable[["Scheduler", Any], Any]] = {
    PauseGeneration: pause,
    ContinueGeneration: go_on,
    FreezeGarbage: freeze_garbage,
    SlowDown: slow_down,
}
