"""Requests that were sent together, and what has come back for them and was not taken yet."""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType

from quartet.runtime.limits import MAX_UNREAD_STEPS
from quartet.runtime.messages import Text

log = logging.getLogger(__name__)

RequestDelta = tuple[int, Text]  # (index of the request in its group, one step of its output)


class ClientGone(Exception):
    """The client has closed its connection; nobody is left to answer."""


class RequestGroup:
    """Requests that were sent together. Leaving the `with` block aborts those that still run."""

    def __init__(self, rids: list[str], abandon: Callable[["RequestGroup"], None]) -> None:
        """`abandon` aborts the requests of the group that have not ended."""
        self.rids = rids
        self._abandon = abandon
        self._deltas: list[RequestDelta] = []  # not taken yet
        self._running = len(rids)
        self._most_unread = MAX_UNREAD_STEPS * len(rids)
        self._waiter: asyncio.Future[None] | None = None
        self._client_gone = False

    def __enter__(self) -> "RequestGroup":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._running:
            self._abandon(self)

    @property
    def finished(self) -> bool:
        """Every request has ended and all its deltas were taken."""
        return not self._running and not self._deltas

    async def next(self) -> list[RequestDelta]:
        """All deltas that have arrived since the last call, at least one. Raises ClientGone."""
        while not self._deltas and not self._client_gone:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._client_gone:
            raise ClientGone
        deltas, self._deltas = self._deltas, []
        return deltas

    def client_left(self) -> None:
        """The client has closed its connection: `next` raises ClientGone from now on."""
        self._client_gone = True
        self._deltas.clear()
        self._wake()

    def put(self, index: int, text: Text) -> None:
        """Add a delta. When too many pile up because the client takes none, the client counts as gone."""
        if self._client_gone:
            return
        self._deltas.append((index, text))
        self._running -= text.tokens.finish is not None
        if len(self._deltas) > self._most_unread:
            log.warning("A client takes nothing of its answer; its %d requests are aborted.", len(self.rids))
            self._abandon(self)
            self.client_left()
            return
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
