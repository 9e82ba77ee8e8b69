"""Streams that outlast their connection: the events of a run are kept, so that a client can read them again.

All logs of a server share one bound of bytes. Logs of runs that have ended go first, the oldest one first; where those
that still grow have too much together, the largest one loses its events. The client that began a run gets its events
all the same, for as long as it is there.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable

from quartet.http_gateway.http.sse import Event, frame
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import EVENT_LOG_AGE_S, MAX_EVENT_LOG_BYTES

FRAMES_AT_ONCE = 1024
DROPPED = "The events of this stream are no longer kept."


class EventLog:
    """The events of one run. They are numbered from 0, in the order in which they were added."""

    def __init__(self) -> None:
        self.size = 0  # bytes
        self.ended_at: float | None = None
        self.dropped = False
        self._frames: list[bytes] = []
        self._unread: list[bytes] | None = []  # by the client that began the run; None when it has gone
        self._changed = asyncio.Event()

    def add(self, events: Iterable[Event]) -> None:
        """Add events; readers get them."""
        added = list(map(frame, events))
        if self._unread is not None:
            self._unread += added
        if not self.dropped:
            self._frames += added
            self.size += sum(map(len, added))
        self.wake()

    def end(self, now: float) -> None:
        """No more events will come."""
        self.ended_at = now
        self.wake()

    def drop(self) -> None:
        """Forget the events: who still reads them gets an error, but for the client that began the run."""
        self.dropped = True
        self.size = 0
        self._frames.clear()
        self.wake()

    def wake(self) -> None:
        """Let the readers look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, start: int, left: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """Yield the events from number `start` on, those that come later too. Raises RequestError once dropped.

        `left`: set, with a call of `wake`, when nobody reads any more.
        """
        at = start
        while not left.is_set():
            changed = self._changed
            if self.dropped:
                raise RequestError(DROPPED, Kind.INTERNAL)
            if frames := self._frames[at : at + FRAMES_AT_ONCE]:
                at += len(frames)
                yield b"".join(frames)
            elif self.ended_at is not None:
                return
            else:
                await changed.wait()

    async def read_as_first(self, left: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """Yield all events, dropped or not: for the client that began the run. It is read once. `left`: as above."""
        try:
            while not left.is_set() and self._unread is not None:
                changed = self._changed
                if self._unread:
                    frames, self._unread = self._unread, []
                    yield b"".join(frames)
                elif self.ended_at is not None:
                    return
                else:
                    await changed.wait()
        finally:
            self._unread = None


class EventLogs:
    """The logs of a server, by the id of what they belong to."""

    def __init__(
        self,
        most_bytes: int = MAX_EVENT_LOG_BYTES,
        most_age_s: float = EVENT_LOG_AGE_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most_age_s`: that a log is kept after its end."""
        self._most_bytes = most_bytes
        self._most_age_s = most_age_s
        self._now = now
        self._size = 0
        self._growing: dict[str, EventLog] = {}
        self._ended: dict[str, EventLog] = {}  # by the time of their end

    def open(self, log_id: str) -> EventLog:
        """A new log."""
        self._drop_old()
        log = self._growing[log_id] = EventLog()
        return log

    def add(self, log: EventLog, events: Iterable[Event]) -> None:
        """Add events to a log; make room for them."""
        before = log.size
        log.add(events)
        self._size += log.size - before
        while self._size > self._most_bytes and self._ended:
            self.drop(next(iter(self._ended)))
        while self._size > self._most_bytes:
            largest = max(self._growing.values(), key=lambda growing: growing.size)
            self._size -= largest.size
            largest.drop()

    def end(self, log_id: str) -> None:
        """No more events will be added to this log."""
        log = self._growing.pop(log_id, None)
        if log is not None:
            log.end(self._now())
            if not log.dropped:
                self._ended[log_id] = log

    def get(self, log_id: str) -> EventLog | None:
        """The log with this id; None where it is not kept."""
        self._drop_old()
        log = self._growing.get(log_id) or self._ended.get(log_id)
        return None if log is None or log.dropped else log

    def drop(self, log_id: str) -> None:
        """Forget a log."""
        log = self._growing.pop(log_id, None) or self._ended.pop(log_id, None)
        if log is not None:
            self._size -= log.size
            log.drop()

    def _drop_old(self) -> None:
        """Forget the logs that ended too long ago."""
        oldest = self._now() - self._most_age_s
        for log_id, log in list(self._ended.items()):
            if log.ended_at is None or log.ended_at >= oldest:
                break
            self.drop(log_id)
