"""Sends sessions by rate or by concurrency and notes when each part of an answer arrives.

Time is the event loop's, so a test with a loop of its own decides what time it is.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence

import httpx
import msgspec

from quartet.runtime.bench.apis import Api, Event, Settings
from quartet.runtime.bench.records import History, Record, Session, Turn
from quartet.runtime.client.connection import MAX_ANSWER_BYTES, ClientError, error_message
from quartet.runtime.client.events import EventReader

NO_USAGE = "the server reported no usage"
END_S = 1.0  # for a connection to end behind the stream's last event, so that it can be used again

Send = Callable[[History, Turn], Awaitable[Record]]
Note = Callable[[Record], None]


class Sender:
    """Sends one request at a time for whoever calls it; many may."""

    def __init__(self, client: httpx.AsyncClient, api: Api, settings: Settings, timeout_s: float) -> None:
        self._client = client
        self._api = api
        self._settings = settings
        self._timeout_s = timeout_s

    async def __call__(self, history: History, turn: Turn) -> Record:
        """Send a turn and read its answer to the end; what fails is in the record, never raised."""
        record = Record(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(history, turn, record)
        except TimeoutError:
            record.error = f"no whole answer within {self._timeout_s:g} s"
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}"
        except ClientError as error:
            record.error = str(error)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            record.error = f"an event that is no chunk of an answer ({error})"
        return record

    async def _exchange(self, history: History, turn: Turn, record: Record) -> None:
        body = self._api.body(history, turn, self._settings)
        loop = asyncio.get_running_loop()
        text: list[str] = []
        ids: list[int] = []
        async with self._client.stream("POST", self._api.path, json=body) as response:
            if response.status_code >= 400:
                record.error = f"HTTP {response.status_code}: {error_message(await beginning(response))}"
                return
            events, read = EventReader(MAX_ANSWER_BYTES), self._api.reader()
            parts = response.aiter_raw()
            async for part in parts:
                now = loop.time()
                for data in events.feed(part):
                    event = read(data)
                    text.append(event.text)
                    ids.extend(event.ids)
                    enter(event, record, now)
                if events.ended:
                    break
            record.ended_at = loop.time()
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                async with asyncio.timeout(END_S):
                    async for _ in parts:
                        pass
        if not record.error and not events.ended:
            record.error = "the stream ended without [DONE]"
        if not record.error and not record.completion_tokens:
            record.error = NO_USAGE
        self._api.remember(history, turn, "".join(text), tuple(ids))


async def beginning(response: httpx.Response) -> bytes:
    """So much of an answer as an error's text may have."""
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            break
    return body


def enter(event: Event, record: Record, now: float) -> None:
    """Note what an event says."""
    record.error = event.error or record.error
    if event.brings_output:
        record.arrived(now)
    if event.usage is not None:
        record.prompt_tokens = event.usage.prompt_tokens
        record.completion_tokens = event.usage.completion_tokens
        details = event.usage.prompt_tokens_details
        record.cached_tokens = (details.cached_tokens or 0) if details else 0


async def by_concurrency(sessions: Sequence[Session], send: Send, note: Note, concurrency: int) -> None:
    """So many sessions at once, each begun when another has ended."""
    left = iter(sessions)
    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(sessions))):
            group.create_task(worker(left, send, note))


async def worker(left: Iterator[Session], send: Send, note: Note) -> None:
    for session in left:
        await run_session(session, send, note)


async def by_rate(
    sessions: Sequence[Session], send: Send, note: Note, times: Sequence[float], concurrency: int | None
) -> None:
    """Each session begins at its own time, whether or not others have ended; `concurrency` bounds how many run."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    places = asyncio.Semaphore(concurrency or len(sessions))
    async with asyncio.TaskGroup() as group:
        for session, at in zip(sessions, times, strict=True):
            await asyncio.sleep(began + at - loop.time())
            await places.acquire()
            group.create_task(run_session(session, send, note)).add_done_callback(lambda _: places.release())


async def run_session(session: Session, send: Send, note: Note) -> None:
    """The turns after another; a failure ends the session."""
    history = History()
    for turn in session:
        record = await send(history, turn)
        note(record)
        if record.error:
            return
