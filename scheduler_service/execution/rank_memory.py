"""Memory that all ranks give back, and take again, between the same two steps.

Rank 0 decides, as one process does; each rank has a `MemorySaver` for its part. Where one of them cannot take its
memory again, those that could give it back: all of them have it, or none does.
"""

from collections.abc import Callable, Iterable
from functools import partial

from quartet.runtime.errors import CommandRefused, Kind
from quartet.runtime.memory_tags import WEIGHTS
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.memory_saver import MemorySaver
from quartet.scheduler_service.execution.rank_messages import Answer, Memory, Release, Resume
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.execution.state_cache import StateCache
from quartet.scheduler_service.weights.update import Updates

Act = Callable[[Iterable[str]], None]


class LeadingSaver(MemorySaver):
    """The memory of rank 0, which the others give back and take with it."""

    def __init__(
        self,
        updates: Updates,
        cache: KVCache,
        keep_weights: bool,
        followers: Followers,
        states: StateCache | None = None,
    ) -> None:
        """`states`: see MemorySaver."""
        super().__init__(updates, cache, keep_weights, states=states, sharing=updates.config.ranks_here)
        self._followers = followers
        self._backup_kept = keep_weights

    @property
    def must_wait(self) -> bool:
        """See MemorySaver.must_wait."""
        return self._followers.busy

    def release(self, tags: Iterable[str] | None) -> None:
        """See MemorySaver.release. Raises CommandRefused where another rank cannot; all have their memory then."""
        named = sorted(self._checked(tags) - self.released)
        self._or_back(
            Release(named, self._backup_kept), super().release, Resume(named, self._backup_kept), super().resume
        )

    def resume(self, tags: Iterable[str] | None) -> None:
        """See MemorySaver.resume. Raises CommandRefused where another rank has no room; all have given it back then."""
        named = sorted(self._checked(tags) & self.released)
        self._or_back(
            Resume(named, self._backup_kept), super().resume, Release(named, self._backup_kept), super().release
        )

    def _or_back(self, there: Memory, own: Act, back: Memory, own_back: Act) -> None:
        """Have all ranks do one thing, or its reverse where one of them could not."""
        if not there.tags:
            return
        try:
            self._followers.together(there, partial(own, there.tags))
        except ConnectionError:  # a rank has ended, and with it the group
            raise
        except (CommandRefused, MemoryError, OSError, RuntimeError):
            self._followers.together(back, partial(own_back, back.tags))
            raise


class FollowingMemory:
    """The memory of a rank other than 0."""

    def __init__(self, updates: Updates, cache: KVCache, states: StateCache | None = None) -> None:
        self._savers = {backup: MemorySaver(updates, cache, backup, states=states) for backup in (False, True)}

    def do(self, message: Memory) -> Answer:
        """Give memory back, or take it again; between two steps."""
        saver = self._savers[message.backup]
        act: Act = saver.release if isinstance(message, Release) else saver.resume
        try:
            act(message.tags)
        except (MemoryError, OSError, RuntimeError) as error:
            what = "released" if isinstance(message, Release) else "resumed"
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            return Answer(refusal=f"Memory cannot be {what}: {reason}.", status=Kind.UNAVAILABLE.status)
        return Answer()

    def weights_are_back(self) -> None:
        """New weights have taken the place of those that were given back."""
        for saver in self._savers.values():
            saver.released.discard(WEIGHTS)
