"""Runs a batch: takes its lines, has so many of them answered at once, and keeps what comes.

Knows nothing of HTTP: whoever calls says how a request is carried out.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

from quartet.runtime.batch import lines
from quartet.runtime.batch.lines import BadLine, Request
from quartet.runtime.batch.results import Results

Execute = Callable[[str, str, bytes], Awaitable[tuple[int, bytes]]]  # method, url, body -> status, body

OVERLOAD = (429, 503)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
TRIES = 60  # ten minutes


async def run_batch(
    batch: Iterator[Request | BadLine],
    results: Results,
    execute: Execute,
    at_once: int,
    progress: Callable[[], None] = lambda: None,
    places: asyncio.Semaphore | None = None,
) -> None:
    """Answer every line that has no result yet. What `execute` raises ends the run; what is done stays done.

    `places`: those of several runs together; a line is read, and in memory, only while it has one.
    """
    turn = asyncio.Lock()
    places = places or asyncio.Semaphore(at_once)

    def following() -> Request | BadLine | None:
        return next((line for line in batch if not results.has(line)), None)

    def keep(line: Request | BadLine, status: int, body: bytes) -> None:
        if isinstance(line, BadLine):
            results.add(lines.failed(line.custom_id, line.failure))
        else:
            results.add(lines.answered(line.custom_id, status, body, line.result_id))

    async def one() -> bool:
        async with contextlib.AsyncExitStack() as held:
            async with turn:
                await held.enter_async_context(places)
                line = await asyncio.to_thread(following)
            if line is None:
                return False
            status, body = (0, b"") if isinstance(line, BadLine) else await patiently(execute, line)
            await asyncio.to_thread(keep, line, status, body)
        progress()
        return True

    async def work() -> None:
        while await one():
            pass

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(at_once):
                workers.create_task(work())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def patiently(execute: Execute, request: Request) -> tuple[int, bytes]:
    """The answer to a request; while the server has too much to do, it is sent again later."""
    pause_s = FIRST_PAUSE_S
    for _ in range(TRIES - 1):
        status, body = await execute("POST", request.url, request.body)
        if status not in OVERLOAD:
            return status, body
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    return await execute("POST", request.url, request.body)
