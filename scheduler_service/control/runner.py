"""Runs the handlers of control commands, within one step or over several."""

import logging
from collections import OrderedDict
from collections.abc import Mapping

from quartet.runtime.control import COMMAND_LOST, ControlCommand, ReleaseMemory, ResumeMemory, WeightChange
from quartet.runtime.errors import CommandRefused, Kind
from quartet.runtime.messages import Message, Reply
from quartet.scheduler_service.control.context import Context, Handler, Resumable

log = logging.getLogger(__name__)

FAILED = "Internal error: the command failed ({})."

REMEMBERED_REPLIES = 64
STATE_CHANGES = (WeightChange, ReleaseMemory, ResumeMemory)  # commands that change weights or memory


class PartialChange(BaseException):
    """A change may be applied in part: this process must end; the next one serves the last committed weights."""


class CommandRunner:
    """Runs commands, within one step or over several."""

    def __init__(self, handlers: Mapping[type[ControlCommand], Handler]) -> None:
        self.handlers = handlers
        self._replies: OrderedDict[str, Reply] = OrderedDict()  # the last ones, by id
        self._unfinished: list[tuple[ControlCommand, Resumable]] = []

    def __bool__(self) -> bool:
        """Whether a command is not finished."""
        return bool(self._unfinished)

    def start(self, context: Context, command: ControlCommand) -> list[Message]:
        """Run the command's handler up to its end or its first yield.

        A command that is sent again, because its reply may be lost, does not run again: its reply is returned again.
        """
        if command.id and (answer := self._replies.get(command.id)):
            return [answer]
        if command.epoch not in (None, context.epoch):  # sent to an earlier scheduler
            return [refused(command, CommandRefused(COMMAND_LOST, Kind.UNAVAILABLE.status))]
        if command.id and any(command.id == known.id for known, _ in self._unfinished):
            return []
        try:
            result = self.handlers[type(command)](context, command)
        except CommandRefused as refusal:
            return self._remember([refused(command, refusal)])
        except Exception as error:
            raise_if_partial(command, error)
            raise
        return self._remember(result) if isinstance(result, list) else self._resume(command, result)

    def advance(self, long_step: bool = False) -> list[Message]:
        """Resume every unfinished command. `long_step`: the next step takes longer than others."""
        unfinished, self._unfinished = self._unfinished, []
        return [message for command, resumable in unfinished for message in self._resume(command, resumable, long_step)]

    def has_unfinished(self, kind: type[ControlCommand]) -> bool:
        """Whether an earlier command of this kind is not finished."""
        return any(isinstance(command, kind) for command, _ in self._unfinished)

    def _resume(self, command: ControlCommand, resumable: Resumable, long_step: bool | None = None) -> list[Message]:
        try:
            resumable.send(long_step)
        except StopIteration as end:
            messages: list[Message] = end.value
            return self._remember(messages)
        except CommandRefused as refusal:
            return self._remember([refused(command, refusal)])
        except Exception as error:
            raise_if_partial(command, error)
            log.exception("a %s command failed", type(command).__name__)
            return self._remember([refused(command, CommandRefused(FAILED.format(type(error).__name__), 500))])
        self._unfinished.append((command, resumable))
        return []

    def _remember(self, messages: list[Message]) -> list[Message]:
        """Remember the replies among the messages, the last ones only. Returns the messages."""
        for message in messages:
            if isinstance(message, Reply):
                self._replies[message.id] = message
        while len(self._replies) > REMEMBERED_REPLIES:
            self._replies.popitem(last=False)
        return messages


def raise_if_partial(command: ControlCommand, error: Exception) -> None:
    """Raise PartialChange if the failed command may have applied a part of its change."""
    if isinstance(command, STATE_CHANGES):
        raise PartialChange(f"{type(command).__name__} failed before it was complete") from error


def refused(command: ControlCommand, refusal: CommandRefused) -> Reply:
    return Reply(id=command.id, success=False, message=refusal.message, status=refusal.status)
