"""Brings a scheduler that comes back to what was decided; until then it gets no requests."""

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
AGAIN_AFTER_S = 60.0  # where all has failed
CANNOT = "Scheduler DP%d cannot serve what the others do: %s"
NO_ANSWER = "it has not answered in time"
NOTHING_CHANGED = "it has not changed what it serves"
BEHIND = (
    "Scheduler DP%d serves version %s of the weights, the others %s, or has not the same adapters, pause and memory; "
    "it gets no requests."
)
NEWER = "The weights of scheduler DP%d were rewritten on the disk since the others read them: update the weights."

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
        self.on_progress: Callable[[], object] = lambda: None  # one has got what it was given, or will not
        schedulers.on_change = self.look_soon
        self._said: dict[int, int] = {}  # rank → epoch
        self._under_way: dict[int, asyncio.Task[None]] = {}  # by rank
        self._again: dict[int, asyncio.TimerHandle] = {}  # by rank, where all has failed
        self._warned: dict[tuple[int, str], tuple[object, ...]] = {}  # rank and text → its last details

    def look_soon(self) -> None:
        """What all must serve has changed: look at each when those that live have told what they serve by now."""
        asyncio.get_running_loop().call_later(LOOK_AFTER_S, self._look_at_all)

    def _look_at_all(self) -> None:
        for one in self._schedulers.up:
            self.look_at(one.rank)

    def look_at(self, rank: int) -> None:
        """A scheduler has spoken: bring it to what was decided, where it serves something else."""
        self.forget_failure(rank)
        if not self._schedulers.is_behind(rank):
            self._say(rank)
        elif rank not in self._under_way and not self._schedulers.changes(rank):  # else it is looked at behind that
            epoch = self._schedulers.all[rank].epoch
            task = self._under_way[rank] = asyncio.create_task(self._level(rank))
            task.add_done_callback(lambda _: self._done(rank, epoch))
        self.on_progress()

    def forget_failure(self, rank: int) -> None:
        """All may be well now: it was started again, say."""
        if (timer := self._again.pop(rank, None)) is not None:
            timer.cancel()

    def _done(self, rank: int, epoch: int) -> None:
        """Look again at a scheduler that was started again meanwhile: what it was given is lost. At others later."""
        del self._under_way[rank]
        one = self._schedulers.all[rank]
        if one.up and one.epoch != epoch:
            self.look_at(rank)
        elif one.up and self._schedulers.is_behind(rank):
            self._look_later(rank)
        self.on_progress()

    def gives(self, rank: int, adapter: str) -> bool:
        """Whether this scheduler is given an adapter that requests may name, or is about to be; "" is the base."""
        one, decided = self._schedulers.all[rank], self._schedulers.decided
        if not adapter or decided is None or not one.up or (rank in self._again and rank not in self._under_way):
            return False
        its = {(name, path) for name, path, _ in one.served.adapters}
        return any(name == adapter and (name, path) not in its for name, path, _ in decided.served.adapters)

    def _look_later(self, rank: int) -> None:
        """Nobody may say anything for long, and a file that could not be read may be there again."""
        self._again[rank] = asyncio.get_running_loop().call_later(AGAIN_AFTER_S, self._look_again, rank)

    def _look_again(self, rank: int) -> None:
        del self._again[rank]
        if self._schedulers.all[rank].up:
            self.look_at(rank)

    async def _level(self, rank: int) -> None:
        decided, own = self._schedulers.decided, self._schedulers.all[rank].served
        assert decided is not None, "known from the first facts on"
        if rank in self._schedulers.left_out:
            self._warn(rank, BEHIND, own.weight_version, decided.served.weight_version, level=logging.WARNING)
        if decided.is_newer(own):
            self._warn(rank, NEWER)
        tries = 0
        while missing := self._missing(rank):
            command = next((one for one in missing if not self._has_to_wait(rank, one)), None)
            if command is None or self._schedulers.changes(rank):
                await asyncio.sleep(LOOK_AFTER_S)  # meanwhile, what all must serve may change
                continue
            wanted = msgspec.structs.replace(command)  # the command gets its number when it is sent
            try:
                answer = await self._run(command, LEVEL_TIMEOUT_S, rank)
            except (RequestError, TimeoutError) as error:
                self._warn(rank, CANNOT, str(error) or NO_ANSWER)
                return
            if wanted not in self._missing(rank):
                tries = 0
                continue
            if tries == 0:
                refusal = answer.message if isinstance(answer, Reply) and not answer.success else ""
                self._warn(rank, CANNOT, refusal or NOTHING_CHANGED)
            if tries == MOST_TRIES:
                return
            tries += 1  # an earlier command of its own may stand in the way, which the gateway before has sent
            await asyncio.sleep(LOOK_AFTER_S * 2**tries)
        self._say(rank)

    def _missing(self, rank: int) -> list[ControlCommand]:
        """What brings a scheduler to what all must serve now; nothing: it serves that."""
        decided = self._schedulers.decided
        assert decided is not None
        return list(decided.missing(self._schedulers.all[rank].served))

    def _has_to_wait(self, rank: int, command: ControlCommand) -> bool:
        """Whether requests use the adapter that is to be unloaded."""
        return isinstance(command, UnloadAdapter) and self._uses(rank, command.lora_name)

    def _warn(self, rank: int, problem: str, *details: object, level: int = logging.ERROR) -> None:
        """Log a problem of a scheduler, once as long as it lasts."""
        if self._warned.get((rank, problem)) != details:
            self._warned[rank, problem] = details
            log.log(level, problem, rank, *details)

    def _say(self, rank: int) -> None:
        """Log once for each incarnation that it gets requests."""
        one = self._schedulers.all[rank]
        if self._schedulers.is_behind(rank):
            return
        self._warned = {about: details for about, details in self._warned.items() if about[0] != rank}
        if self._schedulers.several and self._said.get(rank) != one.epoch:
            self._said[rank] = one.epoch
            log.info("The scheduler DP%d takes requests.", rank)
