"""Carries batches out in the background, and goes on with those that a server before this one had not finished.

A batch's state is in the store, its results so far are in a file beside it (`runtime/batch/results.py`): whatever ends
the process, the next one begins where it stopped. A server that is told to stop drops the requests of batches at once.
"""

import asyncio
import copy
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from quartet.http_gateway.batches import batch as batches
from quartet.http_gateway.batches.batch import Batch, Status, Wrong, WrongList
from quartet.http_gateway.routes.file_store import FileStore, StoredFile, new_id
from quartet.runtime.batch import lines
from quartet.runtime.batch.lines import Entry, Failure
from quartet.runtime.batch.results import Results
from quartet.runtime.batch.run import Execute, run_batch
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import BATCH_REQUESTS_AT_ONCE, MAX_UNFINISHED_BATCHES

log = logging.getLogger(__name__)

TOO_MANY = f"There are {MAX_UNFINISHED_BATCHES} batches that are not over; try again later."
FULL = (
    "The store of files has no room for more results, which all files and running batches share (--files-store-size)."
)
EXPIRED = Failure("batch_expired", "The batch's completion window ended before this request could be executed.")
FILE_DELETED = "The file of the batch was deleted while it ran."
RESULTS_DELETED = "What the server keeps of the batch was deleted while it ran, its results too (--files-store)."
LOOK_EVERY_S = 0.1  # whether the server is up
AGAIN_AFTER_S = 10.0  # a disk was full
THREADS = 2  # that read whole files, of all batches together: threads for requests are others

Result = TypeVar("Result")


class StoreFull(Exception):
    """There is no room for more results."""


class BatchRunner:
    """The batches of one server that are not over."""

    def __init__(
        self, store: FileStore, execute: Execute, is_up: Callable[[], bool], now: Callable[[], float] = time.time
    ) -> None:
        """`is_up`: whether the server takes requests yet. `now`: seconds, as `time.time`."""
        self._store = store
        self._execute = execute
        self._is_up = is_up
        self._now = now
        self._places = asyncio.Semaphore(BATCH_REQUESTS_AT_ONCE)
        self._threads = ThreadPoolExecutor(THREADS, "batches")
        self._live: dict[str, Batch] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._work: dict[str, asyncio.Task[None]] = {}

    async def resume(self) -> None:
        """Go on with what was not finished."""
        for data in await self._store.run(self._store.batches, True):
            self._start(batches.decode(data))

    async def begin(self, batch: Batch) -> None:
        """Keep a new batch and start it. Raises RequestError (429) where there are too many."""
        if len(self._live) >= MAX_UNFINISHED_BATCHES:
            raise RequestError(TOO_MANY, Kind.TOO_MANY)
        self._live[batch.id] = batch
        try:
            await self._keep(batch)
        except BaseException:
            del self._live[batch.id]
            raise
        self._start(batch)

    async def get(self, batch_id: str) -> Batch | None:
        """A batch as it is now; None where there is none."""
        if batch_id in self._live:
            return self._live[batch_id]
        data = await self._store.run(self._store.batch, batch_id)
        return None if data is None else batches.decode(data)

    async def newest(self, count: int, after: str | None) -> list[Batch] | None:
        """So many batches, the newest first, behind this one; None where there is no such one."""
        found = await self._store.run(self._store.newest_batches, count, after)
        if found is None:
            return None
        stored = [batches.decode(data) for data in found]
        return [self._live.get(batch.id, batch) for batch in stored]

    def uses(self, file_id: str) -> str | None:
        """A batch that is not over and reads this file."""
        return next((batch.id for batch in self._live.values() if batch.input_file_id == file_id), None)

    async def cancel(self, batch: Batch) -> Any:
        """Stop a batch that is not over; what is answered already becomes its output. Returns its object as it is now.

        One that is being finished is not stopped any more.
        """
        if batch.status in ("cancelling", "finalizing"):
            return batches.described(batch)
        batch.enter("cancelling", self._now())
        answer = batches.described(batch)
        if batch.id in self._work:
            self._work[batch.id].cancel()
        await self._keep(batch)
        if batch.over:  # its end was being kept already, and comes last
            await self._keep(batch)
        return answer

    def stop(self) -> None:
        """The server ends: drop what runs. The next one goes on with it."""
        for task in self._tasks.values():
            task.cancel()

    def _start(self, batch: Batch) -> None:
        self._live[batch.id] = batch
        task = asyncio.create_task(self._run(batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._forget(batch.id))

    def _forget(self, batch_id: str) -> None:
        self._live.pop(batch_id, None)
        self._tasks.pop(batch_id, None)
        self._work.pop(batch_id, None)

    async def _in_thread(self, work: Callable[..., Result], *given: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)

    async def _run(self, batch: Batch) -> None:
        """A batch to its end. Where a disk is full it waits, and goes on: what is answered stays."""
        while not self._is_up():
            await asyncio.sleep(LOOK_EVERY_S)
        while not batch.over:
            try:
                await self._try(batch)
            except (OSError, RequestError) as error:  # of the files, and of the store
                log.error("Batch %s waits %d s and goes on: %s", batch.id, AGAIN_AFTER_S, error)
                await asyncio.sleep(AGAIN_AFTER_S)

    async def _try(self, batch: Batch) -> None:
        """The same, once. Raises OSError and RequestError where something cannot be kept now."""
        try:
            results = await self._in_thread(self._results, batch)
            try:
                await self._carry_out(batch, results)
            finally:
                self._count(batch, results)
                await self._in_thread(results.close)
        except StoreFull as error:
            made = await self._in_thread(self._split, batch)  # what was answered is not thrown away
            await self._fail(batch, [Wrong("store_full", str(error))], made)
        except FileNotFoundError:
            await self._fail_without_files(batch)
        except (OSError, RequestError):
            raise
        except Exception as error:
            log.error("Batch %s has failed.", batch.id, exc_info=error)
            await self._fail(batch, [Wrong("internal_error", f"Internal error: {type(error).__name__}")])

    def _results(self, batch: Batch) -> Results:
        """The results of a batch so far. They take their share of the room. Raises OSError, later StoreFull."""

        def reserve(size: int) -> None:
            if not self._store.reserve(batch.id, size):
                raise StoreFull(FULL)

        return Results(self._store.partial_of(batch.id), reserve)

    async def _carry_out(self, batch: Batch, results: Results) -> None:
        """Answer what has no answer, and finish the batch in the state that this comes to."""
        end: Status = "completed"
        if not batch.cancelling:
            work = self._work[batch.id] = asyncio.create_task(self._answer(batch, results))
            try:
                await asyncio.wait([work], timeout=max(0.0, batch.expires_at - self._now()))
            finally:
                in_time = work.done()
                work.cancel()  # where time is up, or the server ends
                await asyncio.wait([work])
            if not batch.cancelling and in_time:
                work.result()
            elif not batch.cancelling:
                end = "expired"
                await self._in_thread(self._expire, batch, results)
        if not batch.over:
            await self._finish(batch, results, "cancelled" if batch.cancelling else end)

    async def _answer(self, batch: Batch, results: Results) -> None:
        path = self._store.path_of(batch.input_file_id)
        if batch.status == "validating":
            total, wrong = await self._in_thread(batches.check, path, batch.endpoint)
            if wrong:
                await self._fail(batch, wrong)
                return
            batch.request_counts.total = total
            batch.enter("in_progress", self._now())
            await self._keep(batch)
        if not await self._store.run(self._store.reserve, batch.id, results.size):
            raise StoreFull(FULL)
        progress = partial(self._count, batch, results)
        progress()
        requests = batches.read_batch(path, batch.endpoint)
        await run_batch(requests, results, self._execute, BATCH_REQUESTS_AT_ONCE, progress, self._places)

    def _expire(self, batch: Batch, results: Results) -> None:
        """Say of each request without an answer that its time is over."""
        path = self._store.path_of(batch.input_file_id)
        for line in batches.read_batch(path, batch.endpoint) if batch.request_counts.total else ():
            if not results.has(line):
                results.add(lines.failed(line.custom_id, EXPIRED))
        self._count(batch, results)

    async def _finish(self, batch: Batch, results: Results, end: Status) -> None:
        """Make files of the results, and end."""
        if batch.status == "in_progress":
            batch.enter("finalizing", self._now())
            await self._keep(batch)
        self._count(batch, results)
        await self._end(batch, end, await self._in_thread(self._split, batch))

    def _split(self, batch: Batch) -> list[StoredFile]:
        """The results as two files: answers, and what has failed. An empty one is not made. Raises OSError."""
        output, errors = new_id("file"), new_id("file")
        try:
            return self._write(batch, output, errors)
        except BaseException:
            for file_id in (output, errors):
                self._store.path_of(file_id).unlink(missing_ok=True)
            raise

    def _write(self, batch: Batch, output: str, errors: str) -> list[StoredFile]:
        """The same under these ids."""
        with (
            open(self._store.path_of(output), "xb") as answers,
            open(self._store.path_of(errors), "xb") as failures,
            open(self._store.partial_of(batch.id), "rb") as results,
        ):
            for text in results:
                (answers if msgspec.json.decode(text, type=Entry).succeeded else failures).write(text)
        made = []
        keep_s = batch.output_expires_after.seconds if batch.output_expires_after else None
        for file_id, name in ((output, "output"), (errors, "error")):
            path = self._store.path_of(file_id)
            path.chmod(0o600)
            if size := path.stat().st_size:
                file_name = f"{batch.id}_{name}.jsonl"
                made.append(self._store.described(file_id, size, file_name, "batch_output", keep_s))
                setattr(batch, f"{name}_file_id", file_id)
                synchronize(path)
            else:
                path.unlink()
        return made

    async def _fail_without_files(self, batch: Batch) -> None:
        """End a batch whose file was deleted, or its results too; what is left of them is not thrown away."""
        try:
            made = await self._in_thread(self._split, batch)
        except FileNotFoundError:
            await self._fail(batch, [Wrong("results_deleted", RESULTS_DELETED)])
        else:
            await self._fail(batch, [Wrong("file_deleted", FILE_DELETED)], made)

    async def _fail(self, batch: Batch, wrong: list[Wrong], made: Sequence[StoredFile] = ()) -> None:
        batch.errors = WrongList(wrong)
        await self._end(batch, "failed", made)

    async def _end(self, batch: Batch, end: Status, made: Sequence[StoredFile]) -> None:
        """Keep a batch as over, with its files. Raises RequestError, and then it is not over."""
        ended = copy.copy(batch)
        ended.enter(end, self._now())
        try:
            await self._store.run(self._store.put_batch, batch.id, batches.encode(ended), True, made)
        except RequestError:
            for file in made:
                self._store.path_of(file.id).unlink(missing_ok=True)
            batch.output_file_id = batch.error_file_id = None
            raise
        batch.enter(end, self._now())
        self._store.partial_of(batch.id).unlink(missing_ok=True)

    async def _keep(self, batch: Batch) -> None:
        await self._store.run(self._store.put_batch, batch.id, batches.encode(batch), batch.over)

    def _count(self, batch: Batch, results: Results) -> None:
        batch.request_counts.completed, batch.request_counts.failed = results.succeeded, results.failed


def synchronize(path: Path) -> None:
    """Have a file's content on the disk before it is said to be there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
