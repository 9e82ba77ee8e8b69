"""Control commands on their way round the ring, and whoever waits for their answers."""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quartet.runtime.control import COMMAND_LOST, ControlCommand
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Message


@dataclass(slots=True)
class Waiting:
    """A command that has not been answered."""

    command: ControlCommand
    serial: int
    answer: asyncio.Future[Message]


class Commands:
    """Those under way, by id."""

    def __init__(self, send: Callable[[Sequence[Message]], None], serials: Iterator[int]) -> None:
        """`serials` number requests too, so that both are sent again in the order in which they were sent."""
        self._send = send
        self._serials = serials
        self._waiting: dict[str, Waiting] = {}
        self.epoch = 0  # of the scheduler, as far as is known

    async def carry_out(self, command: ControlCommand, timeout_s: float) -> Message:
        """Send a command round the ring and wait for what comes back. Raises TimeoutError and RequestError."""
        serial = next(self._serials)
        command.id = f"{os.getpid()}.{serial}"  # a gateway that is started again counts afresh
        command.epoch = None if command.harmless else self.epoch
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[command.id] = Waiting(command, serial, answer)
        try:
            self._send([command])
            async with asyncio.timeout(timeout_s):
                return await answer
        finally:
            del self._waiting[command.id]

    def answered(self, id: str, answer: Message) -> Waiting | None:
        """Hand an answer to whoever waits for it; None where nobody does."""
        waiting = self._waiting.get(id)
        if waiting is None or waiting.answer.done():
            return None
        waiting.answer.set_result(answer)
        return waiting

    def recover(self, role: str) -> list[Waiting]:
        """What is to go again after this service's restart: a scheduler that has seen a command knows it.

        What a dead scheduler has seen nobody knows: those commands fail, unless they change nothing.
        """
        again = []
        for waiting in self._waiting.values():
            if role != "scheduler" or waiting.command.harmless:
                again.append(waiting)
            elif not waiting.answer.done():
                waiting.answer.set_exception(RequestError(COMMAND_LOST, Kind.UNAVAILABLE))
        return again
