"""The counters of every service of the ring, asked for with a probe of each scheduler and kept for a while.

Callers at the same time share one probe, so a slow ring is not asked more by being slow. A scheduler that did not
answer in time is asked on and not waited for again until it has answered: what it last said stands for it.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quartet.http_gateway.ring.merging import added
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import SCHEDULER, title_of

log = logging.getLogger(__name__)

COUNTERS_TIMEOUT_S = 5.0
PATIENCE_S = 1.0  # that a caller waits

Counters = Mapping[str, dict[str, Any]]  # by title


@dataclass(slots=True)
class Source:
    """What came of the probes of one scheduler."""

    counters: Counters = field(default_factory=dict)  # of all services that the probe passed
    read_at: float = -float("inf")
    probing: "asyncio.Task[None] | None" = None
    silent: bool = False  # it has let somebody wait for nothing, and has not answered since

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.read_at


class CounterCache:
    """The counters that each service last reported."""

    def __init__(self, ring: RingClient) -> None:
        self.last: Counters = {}
        self._ring = ring
        self._sources = [Source() for _ in ring.schedulers.all]

    async def read(self, max_age_s: float, timeout_s: float = PATIENCE_S) -> Counters:
        """Counters no older than max_age_s; of a scheduler that does not answer in time, the last known ones."""
        asked: list[Source] = []
        for rank in self._ring.schedulers.targets:
            source = self._sources[rank]
            if source.age_s <= max_age_s:
                continue
            if source.probing is None or source.probing.done():
                source.probing = asyncio.create_task(self._probe(rank))
            if not source.silent:
                asked.append(source)
        if probes := [source.probing for source in asked if source.probing]:
            await asyncio.wait(probes, timeout=timeout_s)
        for source in asked:
            if source.probing is not None and not source.probing.done():
                source.silent = True
        self.last = self._merged()
        return self.last

    def unanswered(self, older_than_s: float = 0.0) -> list[int]:
        """The ranks that were asked last and have not answered, or have said nothing for so long."""
        ranks = self._ring.schedulers.targets
        return [rank for rank in ranks if self._sources[rank].silent and self._sources[rank].age_s > older_than_s]

    async def _probe(self, rank: int) -> None:
        source, title = self._sources[rank], self._title(rank)
        try:
            counters = await self._ring.probe(COUNTERS_TIMEOUT_S, rank)
            if title in counters:  # else it has ended meanwhile, and another one has answered
                source.counters, source.read_at, source.silent = counters, time.monotonic(), False
        except (TimeoutError, RequestError) as error:
            source.silent = True
            log.warning("The %s did not say its counters: %s", title, error or "no answer in time")

    def _title(self, rank: int) -> str:
        return title_of(SCHEDULER, rank, len(self._sources))

    def _merged(self) -> Counters:
        """The counters of the text services, of all schedulers that live together, and of each by its title."""
        there = {rank: self._sources[rank] for rank in self._ring.schedulers.targets}
        known = {rank: source.counters for rank, source in there.items() if source.counters}
        if not known:
            return self.last
        freshest = min(known, key=lambda rank: there[rank].age_s)
        own = {self._title(rank): known[rank][self._title(rank)] for rank in known}
        text = {title: numbers for title, numbers in known[freshest].items() if not title.startswith(SCHEDULER)}
        return {**text, SCHEDULER: added(own.values()), **own}
