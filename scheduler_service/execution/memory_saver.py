"""Releases the memory of weights and KV pool while a trainer needs it, and takes it again.

Without a backup the values of the weights are lost: requests then wait until updates have written every tensor.
"""

from collections.abc import Callable, Iterable

import torch

from quartet.runtime.errors import CommandRefused
from quartet.runtime.memory_tags import KV_CACHE, NEEDED, TAGS, WEIGHTS
from quartet.runtime.process.memory import give_back
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.state_cache import StateCache
from quartet.scheduler_service.host.device import shortage
from quartet.scheduler_service.model.adapter_pool import AdapterPool
from quartet.scheduler_service.weights.parameters import Weights
from quartet.scheduler_service.weights.update import Updates


class MemorySaver:
    """Releases and resumes memory by tag; a repeated call changes nothing."""

    def __init__(
        self,
        updates: Updates,
        cache: KVCache,
        keep_weights: bool,
        on_release: Callable[[], None] = lambda: None,
        states: StateCache | None = None,
        sharing: int = 1,
        adapters: AdapterPool | None = None,
    ) -> None:
        """`on_release` is called before memory is released; resumed memory has other addresses.

        `states`: of a model with recurrent layers; they go and come with the KV pool. `sharing`: how many ranks take as
        much of the same memory at the same time. `adapters`: on a GPU; they go with the weights, and are written again
        from the host's memory by the steps that need them.
        """
        self.released: set[str] = set()
        self._updates = updates
        self._caches: list[KVCache | StateCache] = [cache] if states is None else [cache, states]
        self._keep_weights = keep_weights
        self._on_release = on_release
        self._sharing = sharing
        self._adapters = adapters
        self._backup: Weights | None = None

    @property
    def holds_weights(self) -> bool:
        """Whether there are no weights at the moment."""
        return WEIGHTS in self.released

    @property
    def holds_kv_cache(self) -> bool:
        return KV_CACHE in self.released

    @property
    def lacks(self) -> list[str]:
        """Released tags without which nothing can be computed."""
        return [tag for tag in NEEDED if tag in self.released]

    @property
    def must_wait(self) -> bool:
        """Whether memory cannot be released or resumed right now: other ranks are busy, perhaps with a trainer."""
        return False

    def release(self, tags: Iterable[str] | None) -> None:
        """Release the memory of these tags; None: of all."""
        to_release = self._checked(tags) - self.released
        if to_release:
            self._on_release()
        for tag in sorted(to_release):  # in the same order on every rank
            if tag == WEIGHTS:
                self._release_weights()
            elif tag == KV_CACHE:
                for cache in self._caches:
                    cache.release()
            self.released.add(tag)
        give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def resume(self, tags: Iterable[str] | None) -> None:
        """Take the memory of these tags again; None: of all. Raises MemoryError where there is not enough."""
        to_resume = self._checked(tags) & self.released
        if WEIGHTS in to_resume:
            self._check_room()
        for tag in sorted(to_resume):
            if tag == WEIGHTS:
                self._resume_weights()
            elif tag == KV_CACHE:
                for cache in self._caches:
                    cache.allocate()
            self.released.discard(tag)

    def _checked(self, tags: Iterable[str] | None) -> set[str]:
        named = set(tags or TAGS)
        if unknown := sorted(named.difference(TAGS)):
            raise CommandRefused(f"The tag {unknown[0]} is unknown; known are {', '.join(TAGS)}.")
        return named

    def _check_room(self) -> None:
        """Raise MemoryError where the weights do not fit. (The KV pool takes its memory page by page, later.)"""
        live = self._updates.live
        if live.device.type == "cpu" and (reason := shortage(self._sharing * live.served_bytes(), live.device)):
            raise MemoryError(f"there is no room for the weights: {reason}")

    def _release_weights(self) -> None:
        updates = self._updates
        if self._keep_weights:
            self._backup = updates.live.staging(torch.device("cpu"))
            self._backup.copy_from(updates.live)
        else:
            updates.lost = set(updates.live.names())
        updates.drop_second()
        updates.live.release()
        if self._adapters is not None:  # last: what failed before has released nothing
            self._adapters.release()

    def resume_adapters(self) -> None:
        """Take the memory of adapters on the device again; they are written there when a step needs them."""
        if self._adapters is not None:
            self._adapters.allocate()

    def _resume_weights(self) -> None:
        live = self._updates.live
        live.allocate()
        self.resume_adapters()
        if self._backup is not None:
            live.copy_from(self._backup)
            self._backup = None
