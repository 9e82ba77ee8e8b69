"""What waits to be done, in such an order that nobody waits for all of another's."""

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Pieces of work by the call that they belong to. Calls take turns, a piece each; within a call order is kept."""

    def __init__(self) -> None:
        self._calls: OrderedDict[Hashable, deque[T]] = OrderedDict()  # whose turn is next comes first

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
