"""What the gateway asks the ring of its own accord: counters of every hop, and one token as a sign of life.

Callers at the same time share one question, so a slow ring is not asked more by being slow.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, Request, pack_ids
from quartet.runtime.sampling import SamplingParams

log = logging.getLogger(__name__)

COUNTERS_TIMEOUT_S = 5.0
LOOK_EVERY_S = 0.5
FIRST_TOKEN = 0  # in every vocabulary

Counters = Mapping[str, dict[str, Any]]  # by role


class Progress(Protocol):
    """The scheduler's heartbeat (runtime/process/progress.py)."""

    def age_s(self) -> float: ...
    def busy(self) -> bool: ...
    def beats(self) -> int: ...


class Pulse(Protocol):
    """Whether the process of a service runs (runtime/process/progress.py)."""

    def pulse_age_s(self) -> float: ...


class Census:
    """What every hop last said of itself."""

    def __init__(self, ring: RingClient) -> None:
        self.last: Counters = {}
        self._ring = ring
        self._read_at = -float("inf")
        self._asking: asyncio.Task[None] | None = None

    async def read(self, max_age_s: float, timeout_s: float = COUNTERS_TIMEOUT_S) -> Counters:
        """Counters no older than max_age_s; the last known ones when the ring does not answer in time."""
        if time.monotonic() - self._read_at > max_age_s:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            await asyncio.wait([self._asking], timeout=timeout_s)
        return self.last

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._read_at

    async def _ask(self) -> None:
        try:
            self.last = await self._ring.probe(COUNTERS_TIMEOUT_S)
            self._read_at = time.monotonic()
        except (TimeoutError, RequestError) as error:
            log.warning("the ring did not say its counters: %s", error or "no answer in time")


class SignOfLife:
    """Generates one token. A scheduler that is seen to move meanwhile counts as alive: the probe waits its turn."""

    def __init__(
        self, ring: RingClient, progress: Progress, timeout_s: float, task: Literal["generate", "embed"]
    ) -> None:
        self._ring = ring
        self._progress = progress
        self._timeout_s = timeout_s
        self._kind: Literal["generate", "embed"] = task
        self._trying: asyncio.Task[str] | None = None

    async def missing(self) -> str:
        """Why the ring does not generate; empty when it does."""
        if self._trying is None or self._trying.done():
            self._trying = asyncio.create_task(self._try())
        return await asyncio.shield(self._trying)

    async def _try(self) -> str:
        beats = self._progress.beats()
        deadline = time.monotonic() + self._timeout_s
        try:
            with self._ring.open([self._request()], limited=False) as flight:  # a full server is well
                while time.monotonic() < deadline:
                    try:
                        async with asyncio.timeout(LOOK_EVERY_S):
                            await flight.next()
                        return ""
                    except TimeoutError:
                        if self._progress.busy() and self._progress.beats() > beats:
                            return ""
        except RequestError as error:
            return error.message
        log.error("Health check failed: no token came back within %s s.", self._timeout_s)
        return "no token came back in time"

    def _request(self) -> Generate:
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        rid = f"HEALTH_CHECK_{uuid.uuid4().hex}"
        return Generate(
            request=Request(rid=rid, params=params, task=self._kind, log_metrics=False),
            input_ids=pack_ids([FIRST_TOKEN]),
        )
