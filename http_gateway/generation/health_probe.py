"""Whether the ring generates: one token is asked for. Callers at the same time share one request."""

import asyncio
import logging
import time
import uuid
from typing import Literal, Protocol

from quartet.http_gateway.generation.run_group import open_group
from quartet.http_gateway.ring.request_group import RequestGroup
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, Request, pack_ids
from quartet.runtime.sampling import SamplingParams

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
FIRST_TOKEN = 0  # in every vocabulary


class Progress(Protocol):
    """The scheduler's heartbeat (runtime/process/progress.py)."""

    def age_s(self) -> float: ...
    def busy(self) -> bool: ...
    def beats(self) -> int: ...


class Pulse(Protocol):
    """Whether the process of a service runs (runtime/process/progress.py)."""

    def pulse_age_s(self) -> float: ...


class HealthProbe:
    """Generates one token. A busy scheduler whose heartbeat moves meanwhile counts as healthy: the probe is queued."""

    def __init__(
        self, ring: RingClient, progress: Progress, timeout_s: float, task: Literal["generate", "embed"]
    ) -> None:
        self._ring = ring
        self._progress = progress
        self._timeout_s = timeout_s
        self._task: Literal["generate", "embed"] = task
        self._running: asyncio.Task[str] | None = None

    async def failure(self) -> str:
        """Why the ring does not generate; empty when it does."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await asyncio.shield(self._running)

    async def _run(self) -> str:
        try:
            async with open_group(self._ring, [self._request()], limited=False) as group:  # a full server is healthy
                if await self._answers(group):
                    return ""
        except RequestError as error:
            return error.message
        log.error("Health check failed: no token came back within %s s.", self._timeout_s)
        return "no token came back in time"

    async def _answers(self, group: RequestGroup) -> bool:
        """Whether a token comes back, or the heartbeat of a busy scheduler moves, within the timeout."""
        beats = self._progress.beats()
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await group.next()
                return True
            except TimeoutError:
                if self._progress.busy() and self._progress.beats() > beats:
                    return True
        return False

    def _request(self) -> Generate:
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        rid = f"HEALTH_CHECK_{uuid.uuid4().hex}"
        return Generate(
            request=Request(rid=rid, params=params, task=self._task, log_metrics=False),
            input_ids=pack_ids([FIRST_TOKEN]),
        )
