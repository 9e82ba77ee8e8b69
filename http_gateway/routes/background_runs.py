"""Work that outlasts the call that began it, by the id under which clients ask for it."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import MAX_BACKGROUND_BYTES, MAX_BACKGROUND_RUNS

FULL = "The server has as many background responses as it takes at once; try again later."


class BackgroundRun:
    """One piece of work, and what is done when it has ended."""

    def __init__(
        self,
        describe: Callable[[], Any],
        work: Coroutine[Any, Any, None],
        at_end: Callable[[BaseException | None], Awaitable[None]],
    ) -> None:
        """Start the work. `describe`: its state, for a client that asks.

        `at_end` is awaited with the error that has ended the work: None, or CancelledError after `cancel`.
        """
        self.describe = describe
        self._work = asyncio.create_task(work)
        self.ending = asyncio.create_task(self._end(at_end))

    async def cancel(self) -> None:
        """Stop the work, unless it is over. Return when all is done that follows it."""
        self._work.cancel()
        await asyncio.shield(self.ending)

    async def _end(self, at_end: Callable[[BaseException | None], Awaitable[None]]) -> None:
        await asyncio.wait([self._work])
        error = asyncio.CancelledError() if self._work.cancelled() else self._work.exception()
        await at_end(error)


class BackgroundRuns:
    """The runs that have not ended. There is a bound on how many they are, and on the bytes of what they were asked."""

    def __init__(self, most_runs: int = MAX_BACKGROUND_RUNS, most_bytes: int = MAX_BACKGROUND_BYTES) -> None:
        self._most_runs = most_runs
        self._most_bytes = most_bytes
        self._sizes: dict[str, int] = {}  # bytes, of those that have a place
        self._runs: dict[str, BackgroundRun] = {}

    def reserve(self, run_id: str, size: int) -> None:
        """Keep a place for a run whose request has `size` bytes. Raises RequestError (503) where there is none.

        One run alone has a place, however large it is.
        """
        full = len(self._sizes) >= self._most_runs
        if full or (self._sizes and sum(self._sizes.values()) + size > self._most_bytes):
            raise RequestError(FULL, Kind.UNAVAILABLE, field="background")
        self._sizes[run_id] = size

    def release(self, run_id: str) -> None:
        """Give a place back; that of a run that was added is given back at its end."""
        self._sizes.pop(run_id, None)
        self._runs.pop(run_id, None)

    def add(self, run_id: str, run: BackgroundRun) -> None:
        """Keep a run until it has ended."""
        self._runs[run_id] = run
        run.ending.add_done_callback(lambda _: self.release(run_id))

    def get(self, run_id: str) -> BackgroundRun | None:
        """The run with this id; None where it has ended or never was."""
        return self._runs.get(run_id)

    async def finish(self, timeout_s: float) -> None:
        """Wait until every run has ended, but no longer than this."""
        if endings := [run.ending for run in self._runs.values()]:
            await asyncio.wait(endings, timeout=timeout_s)
