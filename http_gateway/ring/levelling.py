"""Gives a scheduler that comes back the weights and adapters that were decided; until then it gets no requests."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from quartet.http_gateway.ring.schedulers import Schedulers
from quartet.runtime.adapters import UnloadAdapter
from quartet.runtime.control import ControlCommand
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Message, Reply

log = logging.getLogger(__name__)

LEVEL_TIMEOUT_S = 600.0
LOOK_AFTER_S = 1.0
MOST_TRIES = 3  # further ones of a command that has changed nothing, within 14 s
CANNOT = "Scheduler DP%d cannot serve what the others do: %s"
NOTHING_CHANGED = "it has not changed what it serves"
BEHIND = (
    "Scheduler DP%d serves version %s of the weights, the others %s, or not the same adapters; it gets no requests."
)

Run = Callable[[ControlCommand, float, int], Awaitable[Message]]  # a command, its time limit, the scheduler's rank


class Leveller:
    """Of all schedulers."""

    def __init__(
        self, schedulers: Schedulers, run: Run, uses: Callable[[int, str], bool] = lambda rank, adapter: False
    ) -> None:
        """`uses`: whether unfinished requests of a scheduler name an adapter; it is not unloaded before their end."""
        self._schedulers = schedulers
        self._run = run
        self._uses = uses
        schedulers.on_change = self.look_soon
        self._said: dict[int, int] = {}  # rank → epoch
        self._under_way: dict[int, asyncio.Task[None]] = {}  # by rank

    def look_soon(self) -> None:
        """What all must serve has changed: look at each when those that live have told what they serve by now."""
        asyncio.get_running_loop().call_later(LOOK_AFTER_S, self._look_at_all)

    def _look_at_all(self) -> None:
        for one in self._schedulers.up:
            self.look_at(one.rank)

    def look_at(self, rank: int) -> None:
        """A scheduler has spoken: bring it to what was decided, where it serves something else."""
        if not self._schedulers.is_behind(rank):
            self._say(rank)
        elif rank not in self._under_way and not self._schedulers.changes(rank):  # else it is looked at behind that
            epoch = self._schedulers.all[rank].epoch
            task = self._under_way[rank] = asyncio.create_task(self._level(rank))
            task.add_done_callback(lambda _: self._done(rank, epoch))

    def _done(self, rank: int, epoch: int) -> None:
        """Look again at a scheduler that was started again meanwhile: what it was given is lost."""
        del self._under_way[rank]
        one = self._schedulers.all[rank]
        if one.up and one.epoch != epoch:
            self.look_at(rank)

    async def _level(self, rank: int) -> None:
        decided, own = self._schedulers.decided, self._schedulers.all[rank].served
        assert decided is not None, "known from the first facts on"
        log.warning(BEHIND, rank, own.weight_version, decided.served.weight_version)
        if decided.is_rewritten(own):
            log.error("Its weights were rewritten on the disk since the others read them: update the weights.")
            return
        tries = 0
        while (command := self._missing(rank)) is not None:
            needed = isinstance(command, UnloadAdapter) and self._uses(rank, command.lora_name)
            if needed or self._schedulers.changes(rank):
                await asyncio.sleep(LOOK_AFTER_S)  # meanwhile, what all must serve may change
                continue
            wanted = msgspec.structs.replace(command)  # the command gets its number when it is sent
            try:
                answer = await self._run(command, LEVEL_TIMEOUT_S, rank)
            except (RequestError, TimeoutError) as error:
                log.error(CANNOT, rank, error)
                return
            if self._missing(rank) != wanted:
                tries = 0
                continue
            if tries == 0:
                refusal = answer.message if isinstance(answer, Reply) and not answer.success else ""
                log.error(CANNOT, rank, refusal or NOTHING_CHANGED)
            if tries == MOST_TRIES:
                return
            tries += 1  # an earlier command of its own may stand in the way, which the gateway before has sent
            await asyncio.sleep(LOOK_AFTER_S * 2**tries)
        self._say(rank)

    def _missing(self, rank: int) -> ControlCommand | None:
        """What brings a scheduler nearer to what all must serve now; None: it serves that."""
        decided = self._schedulers.decided
        assert decided is not None
        return next(decided.missing(self._schedulers.all[rank].served), None)

    def _say(self, rank: int) -> None:
        """Log once for each incarnation that it gets requests."""
        one = self._schedulers.all[rank]
        if self._schedulers.several and not self._schedulers.is_behind(rank) and self._said.get(rank) != one.epoch:
            self._said[rank] = one.epoch
            log.info("The scheduler DP%d takes requests.", rank)
