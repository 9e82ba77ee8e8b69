"""An engine with a tier behind its KV pool: what a scheduler does, for tests that look at numbers."""

import time
from collections.abc import Callable
from typing import Any

from quartet.runtime.messages import LogprobOptions
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.service import Boot
from quartet.scheduler_service.execution.kv_tier import KvTierStore, tier_store
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.weights.update import Updates
from tests.engine import Answer, Engine

PAGE, BLOCK = 4, 64
LENGTH = 3 * BLOCK + 3  # so that the tree and the tier find as many tokens
PROMPTS = [[(7 * number + 3 * place * place) % 300 + 10 for place in range(LENGTH)] for number in range(4)]
PARAMS = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
POOL = 240  # tokens: one prompt at a time
SIZES: dict[str, Any] = {"page_size": PAGE, "max_total_tokens": POOL}
OUTPUT_LOGPROBS = LogprobOptions(start=-1)
WAIT_S = 60


class Tiered:
    """An engine and its tier, turn by turn."""

    def __init__(self, engine: Engine, updates: Updates, followers: Followers | None = None, rank: int = 0) -> None:
        """`followers`: the other ranks of tensor parallel. `rank`: of several schedulers. Raises StartupError."""
        self.engine, self.updates = engine, updates
        boot = Boot(
            role="scheduler",
            run_dir="",
            inbox="",
            outbox="",
            config=engine.config,
            ready_fd=-1,
            lifeline_fd=-1,
            parent_pid=0,
            rank=rank,
        )
        store = tier_store(boot, engine.worker, updates, engine.planner, followers)
        assert isinstance(store, KvTierStore)
        self.store, self.tier = store, store.tier

    def ask(self, number: int, **request: Any) -> Answer:
        rid = self.engine.add(PROMPTS[number], PARAMS, logprobs=OUTPUT_LOGPROBS, **request)
        self.serve(lambda: self.engine.planner.idle)
        return self.engine.answers[rid]

    def serve(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not until():
            self.store.turn(0.0)  # by this clock no read takes too long
            self.engine.step()
            self.tier.check()
            assert time.monotonic() < deadline

    def settle(self) -> None:
        """Until all that is to be written is in its file."""
        self.serve(lambda: not (self.tier.pending or self.tier.commands))
