"""Commands that record which experts a model selects."""

from typing import TYPE_CHECKING

from quartet.runtime.control import (
    ControlCommand,
    DumpExpertDistributionRecord,
    StartExpertDistributionRecord,
    StopExpertDistributionRecord,
)
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message, Reply
from quartet.scheduler_service.control.context import Context, Handler, Resumable

if TYPE_CHECKING:
    from quartet.scheduler_service.execution.experts import ExpertRecorder

STARTED = "Start recording the expert distribution.\n"
STOPPED = "Stop recording the expert distribution.\n"
DUMPED = "Dump expert distribution record.\n"
OFF = "Please set ServerArgs.expert_distribution_recorder_mode to use ExpertDistributionRecorder."


def recorder_of(context: Context) -> "ExpertRecorder":
    if context.worker.expert_recorder is None:
        raise CommandRefused(OFF)
    return context.worker.expert_recorder


def start(context: Context, command: StartExpertDistributionRecord) -> list[Message]:
    """Clear the record and start recording."""
    recorder_of(context).start()
    return [Reply(id=command.id, message=STARTED)]


def stop(context: Context, command: StopExpertDistributionRecord) -> list[Message]:
    """Stop recording."""
    recorder_of(context).stop()
    return [Reply(id=command.id, message=STOPPED)]


def dump(context: Context, command: DumpExpertDistributionRecord) -> Resumable:
    """Write the record to files and clear it. Steps go on meanwhile."""
    yield from recorder_of(context).dump()
    return [Reply(id=command.id, message=DUMPED)]


HANDLERS: dict[type[ControlCommand], Handler] = {
    StartExpertDistributionRecord: start,
    StopExpertDistributionRecord: stop,
    DumpExpertDistributionRecord: dump,
}
