"""An event loop whose time is no clock's: it jumps to the next moment at which something happens.

virtual_time.run(main())     # asyncio.sleep(3600) takes no time, and loop.time() tells 3600 s more
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class NoWaiting(selectors.SelectSelector):
    """Notes how long the loop wanted to wait, and returns at once."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and nothing will happen"
        self.waited_s += timeout
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._waiting = NoWaiting()
        super().__init__(self._waiting)

    def time(self) -> float:
        return self._waiting.waited_s


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end and return the result."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(work)
