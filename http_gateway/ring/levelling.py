"""Gives a scheduler that comes back the weights that the others serve; until then it gets no requests."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from quartet.http_gateway.ring.schedulers import Schedulers
from quartet.runtime.control import REWRITTEN, ControlCommand, UpdateWeightsFromDisk, UpdateWeightVersion
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Message, Reply

log = logging.getLogger(__name__)

LEVEL_TIMEOUT_S = 600.0
LOOK_AFTER_S = 1.0

Run = Callable[[ControlCommand, float, int], Awaitable[Message]]  # a command, its time limit, the scheduler's rank


class Leveller:
    """Of all schedulers."""

    def __init__(self, schedulers: Schedulers, run: Run) -> None:
        self._schedulers = schedulers
        self._run = run
        schedulers.on_change = self.look_soon
        self._said: dict[int, int] = {}  # rank → epoch
        self._under_way: dict[int, asyncio.Task[None]] = {}  # by rank

    def look_soon(self) -> None:
        """The weights of all have changed: look at each when those that live have changed theirs as well."""
        asyncio.get_running_loop().call_later(LOOK_AFTER_S, self._look_at_all)

    def _look_at_all(self) -> None:
        for one in self._schedulers.up:
            self.look_at(one.rank)

    def look_at(self, rank: int) -> None:
        """A scheduler has spoken: bring it to the weights of the others, where it serves other ones."""
        if self._schedulers.all[rank].held:  # looked at again when the others have changed theirs
            return
        if not self._schedulers.is_behind(rank):
            self._say(rank)
        elif rank not in self._under_way:
            self._schedulers.all[rank].levelled = True
            task = self._under_way[rank] = asyncio.create_task(self._level(rank))
            task.add_done_callback(lambda _: self._done(rank))

    def _done(self, rank: int) -> None:
        del self._under_way[rank]
        self._schedulers.all[rank].levelled = False

    async def _level(self, rank: int) -> None:
        reference, own = self._schedulers.reference, self._schedulers.all[rank].served
        assert reference is not None, "known from the first facts on"
        path, version = reference
        log.warning("Scheduler DP%d serves version %s, the others %s; it gets no requests.", rank, own[1], version)
        if own == (path, REWRITTEN.format(version)):
            log.error("Its weights were rewritten on the disk since the others read them: update the weights.")
            return
        command: ControlCommand
        if own[0] == path:
            command = UpdateWeightVersion(new_version=version, abort_all_requests=False)
        else:
            command = UpdateWeightsFromDisk(model_path=path, weight_version=version)
        try:
            answer = await self._run(command, LEVEL_TIMEOUT_S, rank)
        except (RequestError, TimeoutError) as error:
            log.error("Scheduler DP%d could not be brought to version %s: %s", rank, version, error)
            return
        if isinstance(answer, Reply) and not answer.success:
            log.error("Scheduler DP%d could not be brought to version %s: %s", rank, version, answer.message)
        self._say(rank)

    def _say(self, rank: int) -> None:
        """Log once for each incarnation that it gets requests."""
        one = self._schedulers.all[rank]
        if self._schedulers.several and not self._schedulers.is_behind(rank) and self._said.get(rank) != one.epoch:
            self._said[rank] = one.epoch
            log.info("The scheduler DP%d takes requests.", rank)
