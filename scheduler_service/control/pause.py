"""Commands that pause generation, in one of three modes, and continue it; and two aids for tests."""

import gc
import logging

from quartet.runtime.control import ContinueGeneration, ControlCommand, FreezeGarbage, PauseGeneration, SlowDown
from quartet.runtime.messages import Message, Reply
from quartet.scheduler_service.control.context import Context, Handler, Resumable, abort_all

log = logging.getLogger(__name__)

PAUSED = "Generation paused successfully."
CONTINUED = "Generation continued successfully."


def pause(context: Context, command: PauseGeneration) -> Resumable:
    """Plan no further steps. Answered once all launched steps are collected; a second pause gets the same answer.

    If ContinueGeneration arrives before that, this command is answered at once, with "paused": false.
    """
    planner = context.planner
    planner.paused = True
    if command.mode == "abort":
        context.emit(abort_all(context))
    elif command.mode == "retract":
        planner.retract_all()
    while context.launched and planner.paused:
        yield
    context.forget_released()
    log.info("Generation paused (%s). #running-req: %d, #queue-req: %d", command.mode, *request_counts(context))
    return [Reply(id=command.id, message=PAUSED, body={"paused": planner.paused})]


def request_counts(context: Context) -> tuple[int, int]:
    """How many requests run, and how many wait."""
    return len(context.planner.running), len(context.planner.waiting)


def resume(context: Context, command: ContinueGeneration) -> list[Message]:
    context.planner.paused = False
    log.info("Generation continued. #running-req: %d, #queue-req: %d", *request_counts(context))
    return [Reply(id=command.id, message=CONTINUED, body={"paused": False})]


def freeze_garbage(context: Context, command: FreezeGarbage) -> list[Message]:
    gc.freeze()
    return [Reply(id=command.id, message="Garbage collection frozen.\n")]


def slow_down(context: Context, command: SlowDown) -> list[Message]:
    context.step_sleep_s = max(0.0, command.forward_sleep_time or 0.0)
    return [Reply(id=command.id)]


HANDLERS: dict[type[ControlCommand], Handler] = {
    PauseGeneration: pause,
    ContinueGeneration: resume,
    FreezeGarbage: freeze_garbage,
    SlowDown: slow_down,
}
