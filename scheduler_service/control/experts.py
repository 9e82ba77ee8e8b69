"""Commands that record which experts a model chooses."""

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from quartet.runtime.control import (
    ControlCommand,
    DumpExpertDistributionRecord,
    StartExpertDistributionRecord,
    StopExpertDistributionRecord,
)
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message, Reply

if TYPE_CHECKING:
    from quartet.scheduler_service.execution.experts import ExpertRecorder
    from quartet.scheduler_service.scheduler import Scheduler

STARTED = "Start recording the expert distribution.\n"
STOPPED = "Stop recording the expert distribution.\n"
DUMPED = "Dump expert distribution record.\n"
OFF = "Please set ServerArgs.expert_distribution_recorder_mode to use ExpertDistributionRecorder."


def recorder_of(scheduler: "Scheduler") -> "ExpertRecorder":
    if scheduler.worker.expert_recorder is None:
        raise CommandRefused(OFF)
    return scheduler.worker.expert_recorder


def start(scheduler: "Scheduler", command: StartExpertDistributionRecord) -> list[Message]:
    """Begin an empty recording."""
    recorder_of(scheduler).start()
    return [Reply(id=command.id, message=STARTED)]


def stop(scheduler: "Scheduler", command: StopExpertDistributionRecord) -> list[Message]:
    """Record no more."""
    recorder_of(scheduler).stop()
    return [Reply(id=command.id, message=STOPPED)]


def dump(scheduler: "Scheduler", command: DumpExpertDistributionRecord) -> Generator[None, bool | None, list[Message]]:
    """Write the recording to files and forget it; requests run on while they are written."""
    yield from recorder_of(scheduler).dump()
    return [Reply(id=command.id, message=DUMPED)]


HANDLERS: dict[type[ControlCommand], Callable[..., Any]] = {
    StartExpertDistributionRecord: start,
    StopExpertDistributionRecord: stop,
    DumpExpertDistributionRecord: dump,
}
