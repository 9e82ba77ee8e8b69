"""The counters of every service of the ring, asked for with a probe and kept for a while.

Callers at the same time share one probe, so a slow ring is not asked more by being slow.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.errors import RequestError

log = logging.getLogger(__name__)

COUNTERS_TIMEOUT_S = 5.0

Counters = Mapping[str, dict[str, Any]]  # by role


class CounterCache:
    """The counters that each service last reported."""

    def __init__(self, ring: RingClient) -> None:
        self.last: Counters = {}
        self._ring = ring
        self._read_at = -float("inf")
        self._refreshing: asyncio.Task[None] | None = None

    async def read(self, max_age_s: float, timeout_s: float = COUNTERS_TIMEOUT_S) -> Counters:
        """Counters no older than max_age_s; the last known ones when the ring does not answer in time."""
        if time.monotonic() - self._read_at > max_age_s:
            if self._refreshing is None or self._refreshing.done():
                self._refreshing = asyncio.create_task(self._refresh())
            await asyncio.wait([self._refreshing], timeout=timeout_s)
        return self.last

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._read_at

    async def _refresh(self) -> None:
        try:
            self.last = await self._ring.probe(COUNTERS_TIMEOUT_S)
            self._read_at = time.monotonic()
        except (TimeoutError, RequestError) as error:
            log.warning("the ring did not say its counters: %s", error or "no answer in time")
