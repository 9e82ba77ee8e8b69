"""Control commands: one function each, found by the command's type.

A handler takes the scheduler and the command and returns the messages to send on (a Reply, as a rule). One that must
wait is a generator: it is advanced once a step and returns its messages at the end. A refusal is `CommandRefused`.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quartet.runtime.control import (
    COMMAND_LOST,
    Abort,
    ControlCommand,
    FlushCache,
    Probe,
    ReleaseMemory,
    ResumeMemory,
    WeightChange,
)
from quartet.runtime.errors import CommandRefused, Kind
from quartet.runtime.messages import Message, Reply, Request
from quartet.scheduler_service.control import experts as control_experts
from quartet.scheduler_service.control import memory as control_memory
from quartet.scheduler_service.control import pause as control_pause
from quartet.scheduler_service.control import process_groups as control_groups
from quartet.scheduler_service.control import profile as control_profile
from quartet.scheduler_service.control import weights as control_weights

if TYPE_CHECKING:
    from quartet.scheduler_service.scheduler import Scheduler

log = logging.getLogger(__name__)

FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
FLUSH_FAILED = "Flush cache failed.\n"
FLUSH_TIMED_OUT = "Timed out waiting for idle state."
FLUSH_IN_PROGRESS = "Another flush_cache is already in progress."

FAILED = "Internal error: the command failed ({})."

ANSWERS_KEPT = 64
CHANGES = (WeightChange, ReleaseMemory, ResumeMemory)  # commands that change what serves

Waiting = Generator[None, bool | None, list[Message]]
Handler = Callable[["Scheduler", Any], "list[Message] | Waiting"]


class HalfDone(BaseException):
    """What serves may be changed by half: this process ends, and the next one serves what was committed last."""


class Control:
    """Carries out commands, at once or over several steps."""

    def __init__(self, handlers: Mapping[type[ControlCommand], Handler]) -> None:
        self.handlers = handlers
        self._answered: OrderedDict[str, Reply] = OrderedDict()  # the last ones, by id
        self._waiting: list[tuple[ControlCommand, Waiting]] = []

    def __bool__(self) -> bool:
        """Whether a command waits for its next turn."""
        return bool(self._waiting)

    def start(self, scheduler: "Scheduler", command: ControlCommand) -> list[Message]:
        """Run the command's handler up to its end or its first wait.

        One that comes again, since its answer may be lost, is not carried out again.
        """
        if command.id and (answer := self._answered.get(command.id)):
            return [answer]
        if command.epoch not in (None, scheduler.epoch):  # it was meant for the scheduler before
            return [refused(command, CommandRefused(COMMAND_LOST, Kind.UNAVAILABLE.status))]
        if command.id and any(command.id == known.id for known, _ in self._waiting):
            return []
        try:
            result = self.handlers[type(command)](scheduler, command)
        except CommandRefused as refusal:
            return self._kept([refused(command, refusal)])
        except Exception as error:
            end_where_half_done(command, error)
            raise
        return self._kept(result) if isinstance(result, list) else self._turn(command, result)

    def advance(self, long_step: bool = False) -> list[Message]:
        """Give every waiting command a turn. `long_step`: the step that comes is longer than others."""
        turns, self._waiting = self._waiting, []
        return [message for command, waiting in turns for message in self._turn(command, waiting, long_step)]

    def has_waiting(self, kind: type[ControlCommand]) -> bool:
        """Whether an earlier command of this kind waits."""
        return any(isinstance(command, kind) for command, _ in self._waiting)

    def _turn(self, command: ControlCommand, waiting: Waiting, long_step: bool | None = None) -> list[Message]:
        try:
            waiting.send(long_step)
        except StopIteration as end:
            messages: list[Message] = end.value
            return self._kept(messages)
        except CommandRefused as refusal:
            return self._kept([refused(command, refusal)])
        except Exception as error:
            end_where_half_done(command, error)
            log.exception("a %s command failed", type(command).__name__)
            return self._kept([refused(command, CommandRefused(FAILED.format(type(error).__name__), 500))])
        self._waiting.append((command, waiting))
        return []

    def _kept(self, messages: list[Message]) -> list[Message]:
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


def abort(scheduler: "Scheduler", command: Abort) -> list[Message]:
    """End what the command names; there is no reply, the requests' own last messages tell."""
    rids = matching(command, [request.rid for request in scheduler.requests if meant(command, request)])
    return [message for rid in rids for message in scheduler.abort(rid, command.abort_message)]


def meant(command: Abort, request: Request) -> bool:
    """Whether this attempt is one that the command knows of."""
    return command.attempt is None or request.attempt <= command.attempt


def matching(command: Abort, live: Iterable[str]) -> list[str]:
    """The live rids that an Abort means: all, a prefix, or one rid and the `rid_<i>` of its batch."""
    if command.abort_all:
        return list(live)
    if not command.rid:
        log.warning("ignored an abort without a rid")
        return []
    if command.exact:
        return [rid for rid in live if rid == command.rid]
    if command.prefix:
        return [rid for rid in live if rid.startswith(command.rid)]
    child = command.rid + "_"
    return [rid for rid in live if rid == command.rid or (rid.startswith(child) and rid[len(child) :].isdecimal())]


def flush_cache(scheduler: "Scheduler", command: FlushCache) -> Waiting:
    """Forget the prefix cache as soon as nothing runs or waits, or all of it is paused, within the command's time."""
    planner, deadline = scheduler.planner, scheduler.now + command.timeout
    if scheduler.control.has_waiting(FlushCache):
        raise CommandRefused(FLUSH_IN_PROGRESS)
    while not (planner.idle or planner.paused):
        if scheduler.now >= deadline:
            log.info(
                "Cache not flushed because there are pending requests. #queue-req: %d, #running-req: %d",
                len(planner.waiting),
                len(planner.running),
            )
            raise CommandRefused(FLUSH_TIMED_OUT if command.timeout > 0 else FLUSH_FAILED)
        yield
    planner.forget_prefixes()
    log.info("Cache flushed successfully!")
    return [Reply(id=command.id, message=FLUSHED)]


def probe(scheduler: "Scheduler", command: Probe) -> list[Message]:
    """Add this service's figures and pass the probe on."""
    command.counters["scheduler"] = scheduler.figures()
    return [command]


HANDLERS: dict[type[ControlCommand], Handler] = {
    Abort: abort,
    FlushCache: flush_cache,
    Probe: probe,
    **control_experts.HANDLERS,
    **control_weights.HANDLERS,
    **control_groups.HANDLERS,
    **control_pause.HANDLERS,
    **control_profile.HANDLERS,
    **control_memory.HANDLERS,
}
