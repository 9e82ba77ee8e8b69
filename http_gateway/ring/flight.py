"""Requests sent together, and the mailbox of what comes back for them."""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType

from quartet.runtime.limits import MAX_UNREAD_STEPS
from quartet.runtime.messages import Text

log = logging.getLogger(__name__)

Delivery = tuple[int, Text]  # (index of the request in its flight, one step of it)


class ClientGone(Exception):
    """The client has closed its connection; nobody is left to answer."""


class Flight:
    """Requests sent together and the mailbox of what comes back. Leaving the `with` block aborts what still runs."""

    def __init__(self, rids: list[str], abandon: Callable[["Flight"], None]) -> None:
        self.rids = rids
        self._abandon = abandon
        self._mail: list[Delivery] = []
        self._running = len(rids)
        self._most_unread = MAX_UNREAD_STEPS * len(rids)
        self._waiter: asyncio.Future[None] | None = None
        self._client_gone = False

    def __enter__(self) -> "Flight":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._running:
            self._abandon(self)

    @property
    def finished(self) -> bool:
        """Every request has ended and everything it produced was taken."""
        return not self._running and not self._mail

    async def next(self) -> list[Delivery]:
        """All that has arrived since the last call, at least one delivery. Raises ClientGone."""
        while not self._mail and not self._client_gone:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._client_gone:
            raise ClientGone
        mail, self._mail = self._mail, []
        return mail

    def leave(self) -> None:
        """The client has gone: wake whoever waits in `next`."""
        self._client_gone = True
        self._mail.clear()
        self._wake()

    def put(self, index: int, text: Text) -> None:
        """Deliver a step. A client that takes none of them, so that they pile up, counts as gone."""
        if self._client_gone:
            return
        self._mail.append((index, text))
        self._running -= text.tokens.finish is not None
        if len(self._mail) > self._most_unread:
            log.warning("A client takes nothing of its answer; its %d requests are aborted.", len(self.rids))
            self._abandon(self)
            self.leave()
            return
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
