"""Time that is what the simulation says: an agenda of what is due, and an event loop that is turned by hand."""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

Action = Callable[[], Any]


class Agenda:
    """What is to happen when. Things due at the same time happen in the order in which they were noted."""

    def __init__(self) -> None:
        self.now = 0.0
        self._entries: list[tuple[float, int, Action]] = []
        self._serials = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._entries)

    def at(self, when: float, action: Action) -> None:
        heapq.heappush(self._entries, (when, next(self._serials), action))

    def after(self, delay: float, action: Action) -> None:
        self.at(self.now + delay, action)

    def skip_to_next(self) -> None:
        """Nothing happens until the next entry is due."""
        self.now = max(self.now, self._entries[0][0])

    def run_due(self) -> None:
        while self._entries and self._entries[0][0] <= self.now:
            heapq.heappop(self._entries)[2]()


class TurnLoop(asyncio.AbstractEventLoop):
    """One turn runs what is ready, once. Timers are entries of the agenda, so no time passes by itself."""

    def __init__(self, agenda: Agenda) -> None:
        self.ready: deque[asyncio.Handle] = deque()
        self.ended: list[asyncio.Task[Any]] = []  # for whoever looks at how
        self._tasks: list[asyncio.Task[Any]] = []
        self._agenda = agenda

    def turn(self) -> bool:
        """Whether anything was ready."""
        if not self.ready:
            return False
        asyncio._set_running_loop(self)
        try:
            for _ in range(len(self.ready)):
                handle = self.ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)
        return True

    def abandon(self) -> None:
        """Go on with nothing."""
        for task in self._tasks:
            if not task.done() and (coroutine := task.get_coro()):
                coroutine.close()

    def time(self) -> float:
        return self._agenda.now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._agenda.at(when, lambda: handle.cancelled() or self.ready.append(handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> "asyncio.Task[Any]":  # type: ignore[override]
        task = asyncio.Task(coro, loop=self, **options)
        task.add_done_callback(self.ended.append)
        self._tasks.append(task)
        return task

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Whoever turns the loop looks at what tasks raise; a dead gateway's may be left pending."""

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Its entry is passed over when it is due."""
