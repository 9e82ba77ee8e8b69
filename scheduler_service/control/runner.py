"""Carries out control commands, at once or over several steps."""

import logging
from collections import OrderedDict
from collections.abc import Mapping

from quartet.runtime.control import COMMAND_LOST, ControlCommand, ReleaseMemory, ResumeMemory, WeightChange
from quartet.runtime.errors import CommandRefused, Kind
from quartet.runtime.messages import Message, Reply
from quartet.scheduler_service.control.context import Context, Handler, Resumable

log = logging.getLogger(__name__)

FAILED = "Internal error: the command failed ({})."

ANSWERS_KEPT = 64
CHANGES = (WeightChange, ReleaseMemory, ResumeMemory)  # commands that change what serves


class HalfDone(BaseException):
    """What serves may be changed by half: this process ends, and the next one serves what was committed last."""


class CommandRunner:
    """Carries out commands, at once or over several steps."""

    def __init__(self, handlers: Mapping[type[ControlCommand], Handler]) -> None:
        self.handlers = handlers
        self._answered: OrderedDict[str, Reply] = OrderedDict()  # the last ones, by id
        self._unfinished: list[tuple[ControlCommand, Resumable]] = []

    def __bool__(self) -> bool:
        """Whether a command waits for its next turn."""
        return bool(self._unfinished)

    def start(self, context: Context, command: ControlCommand) -> list[Message]:
        """Run the command's handler up to its end or its first wait.

        One that comes again, since its answer may be lost, is not carried out again.
        """
        if command.id and (answer := self._answered.get(command.id)):
            return [answer]
        if command.epoch not in (None, context.epoch):  # it was meant for the scheduler before
            return [refused(command, CommandRefused(COMMAND_LOST, Kind.UNAVAILABLE.status))]
        if command.id and any(command.id == known.id for known, _ in self._unfinished):
            return []
        try:
            result = self.handlers[type(command)](context, command)
        except CommandRefused as refusal:
            return self._remembered([refused(command, refusal)])
        except Exception as error:
            end_where_half_done(command, error)
            raise
        return self._remembered(result) if isinstance(result, list) else self._resume(command, result)

    def advance(self, long_step: bool = False) -> list[Message]:
        """Give every waiting command a turn. `long_step`: the step that comes is longer than others."""
        unfinished, self._unfinished = self._unfinished, []
        return [message for command, resumable in unfinished for message in self._resume(command, resumable, long_step)]

    def has_waiting(self, kind: type[ControlCommand]) -> bool:
        """Whether an earlier command of this kind waits."""
        return any(isinstance(command, kind) for command, _ in self._unfinished)

    def _resume(self, command: ControlCommand, resumable: Resumable, long_step: bool | None = None) -> list[Message]:
        try:
            resumable.send(long_step)
        except StopIteration as end:
            messages: list[Message] = end.value
            return self._remembered(messages)
        except CommandRefused as refusal:
            return self._remembered([refused(command, refusal)])
        except Exception as error:
            end_where_half_done(command, error)
            log.exception("a %s command failed", type(command).__name__)
            return self._remembered([refused(command, CommandRefused(FAILED.format(type(error).__name__), 500))])
        self._unfinished.append((command, resumable))
        return []

    def _remembered(self, messages: list[Message]) -> list[Message]:
        """The same messages; replies among them are remembered for a while."""
        for message in messages:
            if isinstance(message, Reply):
                self._answered[message.id] = message
        while len(self._answered) > ANSWERS_KEPT:
            self._answered.popitem(last=False)
        return messages


def end_where_half_done(command: ControlCommand, error: Exception) -> None:
    """Raise HalfDone where a failure may have left half of a change in what serves."""
    if isinstance(command, CHANGES):
        raise HalfDone(f"{type(command).__name__} failed in its midst") from error


def refused(command: ControlCommand, refusal: CommandRefused) -> Reply:
    return Reply(id=command.id, success=False, message=refusal.message, status=refusal.status)
