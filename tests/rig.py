"""A scheduler between a fake inbox and a fake outbox: its whole loop, one step at a time."""

from collections.abc import Callable
from typing import Any

from quartet.runtime.messages import Tokens
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.scheduler import Scheduler
from tests.fakes import FakeInbox, FakeOutbox, FakeProgress, FakeWorker, next_token
from tests.stepper import VOCABULARY, config

PROMPT = [10, 11, 12, 13, 14, 15, 16]


class Rig:
    """A scheduler between a fake inbox and a fake outbox, on a clock that the test moves."""

    def __init__(
        self, depth: int = 0, grammars: Any = None, model: Callable[..., int] = next_token, **changes: Any
    ) -> None:
        settings = config(**changes)
        self.worker = FakeWorker(
            settings.page_size, settings.total_pages, settings.max_running, VOCABULARY, model=model
        )
        self.inbox, self.outbox, self.progress = FakeInbox(), FakeOutbox(), FakeProgress()
        self.time = 0.0
        self.scheduler = Scheduler(
            Planner(settings),
            self.worker,
            self.inbox,
            self.outbox,
            self.progress,
            depth=depth,
            grammars=grammars,
            clock=self.clock,
        )

    def clock(self) -> float:
        return self.time

    def run(self) -> None:
        """Until there is nothing to do, one second a step."""
        self.scheduler.step()
        while not self.scheduler.idle:
            self.time += 1.0
            self.scheduler.step()

    def tokens(self, rid: str) -> list[Tokens]:
        return [m for m in self.outbox.messages if isinstance(m, Tokens) and m.rid == rid]
