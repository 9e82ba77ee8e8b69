"""Control commands that were sent through the ring and have not been answered."""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quartet.runtime.control import COMMAND_LOST, ControlCommand
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Message


@dataclass(slots=True)
class UnansweredCommand:
    """A command that was sent, and the future that gets its answer."""

    command: ControlCommand
    serial: int
    answer: asyncio.Future[Message]


class Commands:
    """Sends commands through the ring, and hands each answer to the caller that waits for it."""

    def __init__(self, send: Callable[[Sequence[Message]], None], serials: Iterator[int]) -> None:
        """`serials` number requests too, so that both are sent again in the order in which they were sent."""
        self._send = send
        self._serials = serials
        self._unanswered: dict[str, UnansweredCommand] = {}  # by id
        self.epoch = 0  # the last one that a scheduler has reported

    async def run(self, command: ControlCommand, timeout_s: float) -> Message:
        """Send a command through the ring and wait for its answer. Raises TimeoutError and RequestError."""
        serial = next(self._serials)
        command.id = f"{os.getpid()}.{serial}"  # serials start again when the gateway restarts
        command.epoch = None if command.read_only else self.epoch
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._unanswered[command.id] = UnansweredCommand(command, serial, answer)
        try:
            self._send([command])
            async with asyncio.timeout(timeout_s):
                return await answer
        finally:
            del self._unanswered[command.id]

    def deliver(self, id: str, answer: Message) -> UnansweredCommand | None:
        """Hand an answer to its caller, and return the command; None where no caller waits for it."""
        unanswered = self._unanswered.get(id)
        if unanswered is None or unanswered.answer.done():
            return None
        unanswered.answer.set_result(answer)
        return unanswered

    def recover(self, role: str) -> list[UnansweredCommand]:
        """The commands to send again after the service `role` has restarted.

        The scheduler runs a command with the same id once, so sending it again is safe. After a restart of the
        scheduler itself it is unknown which commands took effect: those that are not read-only fail.
        """
        to_send = []
        for unanswered in self._unanswered.values():
            if role != "scheduler" or unanswered.command.read_only:
                to_send.append(unanswered)
            elif not unanswered.answer.done():
                unanswered.answer.set_exception(RequestError(COMMAND_LOST, Kind.UNAVAILABLE))
        return to_send
