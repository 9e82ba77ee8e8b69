"""A fair queue: no call waits for all the work of another."""

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Pieces of work by the call that they belong to: one piece of each call in turn, in order within a call."""

    def __init__(self) -> None:
        self._calls: OrderedDict[Hashable, deque[T]] = OrderedDict()  # the call that is served next comes first

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, call: Hashable, piece: T) -> None:
        self._calls.setdefault(call, deque()).append(piece)

    def next(self) -> T:
        """Take the next piece; there must be one."""
        call, pieces = self._calls.popitem(last=False)
        piece = pieces.popleft()
        if pieces:
            self._calls[call] = pieces  # behind the others
        return piece
