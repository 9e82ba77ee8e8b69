"""Control commands that were sent through the ring and have not been answered.

Where there are several schedulers, a command goes to each of them, and its answers become one. What is `all_or_none`
is prepared by all, and made by all or by none: this is where it is decided. Other commands are decided when they are
sent; of those that one of them refuses, the answer says which have carried them out.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from quartet.http_gateway.ring.merging import merge
from quartet.http_gateway.ring.schedulers import Schedulers
from quartet.runtime.adapters import LoadAdapter
from quartet.runtime.control import COMMAND_LOST, ControlCommand, DecideChange, WeightChange
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import SCHEDULER, Message, Prepared, Reply

REMEMBERED_DECISIONS = 64
OTHER_REFUSED = "Another scheduler refused: {}"
OTHER_ENDED = "Nothing was changed: a scheduler ended while the change was prepared. Send it again."
PARTLY = "{} (scheduler DP{}; it was done in {})."
NOBODY_WAITS = "Nothing was changed: nobody waits for the answer any more."
OTHER_FILES = "Nothing was changed: the files were rewritten while the schedulers read them. Send it again."


@dataclass(slots=True)
class UnansweredCommand:
    """A command that was sent, and the future that gets its answer."""

    command: ControlCommand
    serial: int
    answer: asyncio.Future[Message]
    epochs: dict[int, int | None]  # by rank of the schedulers that it was sent to
    left_out: Collection[int] = ()  # ranks whose weights are not those of which a client knows the version
    decided: bool = False  # it is part of what all must serve
    answers: dict[int, Message] = field(default_factory=dict)  # by rank
    prepared: dict[int, str] = field(default_factory=dict)  # rank → the weight files that it has read
    cause: Reply | None = None  # the first refusal

    @property
    def waiting(self) -> list[int]:
        """The ranks whose answers are still to come."""
        return [rank for rank in self.epochs if rank not in self.answers]

    @property
    def succeeded(self) -> bool:
        if not self.answer.done() or self.answer.cancelled() or self.answer.exception():
            return False
        result = self.answer.result()
        return isinstance(result, Reply) and result.success

    @property
    def weight_files(self) -> str:
        """What all have read who are prepared."""
        return next(iter(self.prepared.values()), "")

    def messages(self) -> list[ControlCommand]:
        """The command as it is to be sent, to each scheduler that has not answered."""
        return [self._message(rank) for rank in self.waiting]

    def _message(self, rank: int) -> ControlCommand:
        message = msgspec.structs.replace(self.command, rank=rank, epoch=self.epochs[rank])
        if isinstance(message, WeightChange) and rank in self.left_out:
            message.expected_version = None
        return message


class Commands:
    """Sends commands through the ring, and hands each answer to the caller that waits for it."""

    def __init__(
        self, send: Callable[[Sequence[Message]], None], serials: Iterator[int], schedulers: Schedulers
    ) -> None:
        """`serials` number requests too, so that both are sent again in the order in which they were sent."""
        self._send = send
        self._serials = serials
        self._schedulers = schedulers
        self._unanswered: dict[str, UnansweredCommand] = {}  # by id
        changes = schedulers.decided.changes if schedulers.decided else ()  # of the gateway before, too
        self._decisions = OrderedDict(dict.fromkeys(changes, ""))  # by id: why a change is not made; empty: it is
        schedulers.changes = self._is_changing

    async def run(self, command: ControlCommand, timeout_s: float, rank: int | None = None) -> Message:
        """Send a command through the ring and wait for its answer. Raises TimeoutError and RequestError.

        `rank`: for this scheduler alone. Else it is for all of them; one that changes something waits until all live.
        """
        async with asyncio.timeout(timeout_s):
            if rank is None and command.for_schedulers and not command.read_only:
                await self._schedulers.complete()
            unanswered = self._begin(command, rank)
            try:
                self._send(unanswered.messages())
                return await unanswered.answer
            finally:
                del self._unanswered[command.id]

    def _begin(self, command: ControlCommand, rank: int | None) -> UnansweredCommand:
        serial = next(self._serials)
        command.id = f"{os.getpid()}.{serial}"  # serials start again when the gateway restarts
        ranks = self._schedulers.targets_of(command) if rank is None else [rank]
        if not command.for_schedulers:
            ranks = ranks[:1]
        command.waits_for_others = command.all_or_none and len(ranks) > 1
        epochs = {rank: None if command.read_only else self._schedulers.all[rank].epoch for rank in ranks}
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        left_out = self._schedulers.left_out if command.waits_for_others else ()
        unanswered = self._unanswered[command.id] = UnansweredCommand(command, serial, answer, epochs, left_out)
        if rank is None and not (command.read_only or command.waits_for_others):
            self._note_decided(unanswered)
        return unanswered

    def _note_decided(self, unanswered: UnansweredCommand) -> None:
        """All are to carry it out; they are looked at when it has ended, however it has."""
        unanswered.decided = self._schedulers.decide(unanswered.command, unanswered.weight_files)
        if unanswered.decided:
            unanswered.answer.add_done_callback(lambda _: self._schedulers.on_change())

    def _is_changing(self, rank: int) -> bool:
        """Whether a scheduler has not yet answered a command that has changed what all must serve."""
        commands = self._unanswered.values()
        return any(one.decided and rank in one.waiting and not one.answer.done() for one in commands)

    def deliver(self, answer: Message, id: str, rank: int) -> UnansweredCommand | None:
        """Take the answer of one scheduler, and return the command; None where no caller waits for it."""
        unanswered = self._unanswered.get(id)
        if unanswered is None or unanswered.answer.done():
            return None
        if not unanswered.command.for_schedulers:
            rank = next(iter(unanswered.epochs))
        if rank not in unanswered.waiting:
            return None
        unanswered.answers[rank] = answer
        if isinstance(answer, Reply) and not answer.success:
            unanswered.cause = unanswered.cause or answer
            self._decide(unanswered, OTHER_REFUSED.format(answer.message))
        self._finish(unanswered)
        return unanswered

    def _finish(self, unanswered: UnansweredCommand) -> None:
        """Give the answer once every scheduler has given its own."""
        if unanswered.waiting or unanswered.answer.done():
            return
        if unanswered.answers:
            count = len(self._schedulers.all)
            cause = unanswered.cause and partly(unanswered.cause, unanswered.answers)
            unanswered.answer.set_result(cause or merge(unanswered.command, unanswered.answers, count))
        else:
            unanswered.answer.set_exception(lost())

    # changes that all schedulers make or none

    def on_prepared(self, prepared: Prepared) -> None:
        """A scheduler is prepared for a change: decide once all are."""
        unanswered = self._unanswered.get(prepared.id)
        if unanswered is not None:
            unanswered.prepared[prepared.rank] = prepared.weight_files
            if unanswered.prepared.keys() >= unanswered.epochs.keys():
                other_files = OTHER_FILES if len(set(unanswered.prepared.values())) > 1 else ""
                self._decide(unanswered, other_files or self._schedulers.conflict(unanswered.command))
        reason = self._decisions.get(prepared.id) if unanswered or prepared.id in self._decisions else NOBODY_WAITS
        if reason is not None:
            self._tell(prepared.id, reason, [prepared.rank])

    def _decide(self, unanswered: UnansweredCommand, reason: str) -> None:
        """Decide on a change, once; all that wait for it hear so."""
        command = unanswered.command
        if not command.waits_for_others or command.id in self._decisions:
            return
        self._decisions[command.id] = reason
        if not reason:
            self._note_decided(unanswered)
        while len(self._decisions) > REMEMBERED_DECISIONS:
            self._decisions.popitem(last=False)
        self._tell(command.id, reason, unanswered.waiting)

    def _tell(self, change: str, reason: str, ranks: Sequence[int]) -> None:
        """Send the decision on a change."""
        decided = self._schedulers.decided
        version = decided.served.weight_version if decided else ""
        words = [DecideChange(change=change, reason=reason, weight_version=version, rank=rank) for rank in ranks]
        self._send(words)

    # restarts

    def recover(self, role: str, rank: int = 0) -> list[UnansweredCommand]:
        """The commands to send again after the service `role`, of schedulers that of `rank`, has died.

        The scheduler runs a command with the same id once, so sending it again is safe. After the death of the
        scheduler itself it is unknown which commands took effect: those that are not read-only fail.
        """
        if role != SCHEDULER:
            return [unanswered for unanswered in self._unanswered.values() if unanswered.waiting]
        had_it = [unanswered for unanswered in self._unanswered.values() if rank in unanswered.waiting]
        return [unanswered for unanswered in had_it if self._survives(unanswered, rank)]

    def _survives(self, unanswered: UnansweredCommand, rank: int) -> bool:
        """Do without the answer of a dead scheduler. Returns whether the command is to be sent again."""
        command = unanswered.command
        if command.read_only and len(unanswered.epochs) == 1:
            unanswered.epochs = {self._schedulers.targets[0]: None}
            return True
        if not (command.read_only or self._can_do_without(unanswered)):
            if not unanswered.answer.done():
                unanswered.answer.set_exception(lost())
            return False
        del unanswered.epochs[rank]
        if not command.read_only:
            self._decide(unanswered, OTHER_ENDED)
        self._finish(unanswered)
        return False

    def _can_do_without(self, unanswered: UnansweredCommand) -> bool:
        """Whether all is well though a scheduler has died: nothing is done, or it is made up for (levelling.py)."""
        command = unanswered.command
        is_made_up_for = isinstance(command, WeightChange | LoadAdapter)
        return command.waits_for_others and (is_made_up_for or not unanswered.decided)


def partly(cause: Reply, answers: Mapping[int, Message]) -> Reply:
    """The refusal of one scheduler; it says which others have done what was asked."""
    done = [f"DP{rank}" for rank, reply in sorted(answers.items()) if isinstance(reply, Reply) and reply.success]
    if not done:
        return cause
    message = PARTLY.format(cause.message.rstrip("."), cause.rank, " and ".join(done))
    return msgspec.structs.replace(cause, message=message)


def lost() -> RequestError:
    return RequestError(COMMAND_LOST, Kind.UNAVAILABLE)
