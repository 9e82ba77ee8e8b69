"""A planner driven step by step with the fake worker, at any depth of overlap: the loop without messages."""

from array import array
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from quartet.runtime.messages import Finish, LogprobOptions, Request, Tokenized, pack_ids, unpack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan, Update
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.rules import PlannerConfig
from tests.fakes import FakeGrammar, FakeWorker, next_token

VOCABULARY = 1000


def config(**changes: Any) -> PlannerConfig:
    """A small pool by default: 1000 tokens in pages of one."""
    settings: dict[str, Any] = {
        "page_size": 1,
        "total_pages": 1000,
        "max_running": 8,
        "context_length": 500,
        "vocab_size": VOCABULARY,
        **changes,
    }
    return PlannerConfig(**settings)


def tokenized(
    rid: str,
    prompt: Iterable[int],
    max_new_tokens: int | None = 4,
    *,
    task: Any = "generate",
    logprobs: LogprobOptions | None = None,
    seed: int = 0,
    attempt: int = 0,
    epoch: int = 0,
    priority: int = 0,
    extra_key: str = "",
    resume: Iterable[int] = (),
    embeds: bytes = b"",
    hidden: bool = False,
    routed_from: int | None = None,
    **params: Any,
) -> Tokenized:
    request = Request(
        rid=rid,
        params=SamplingParams(max_new_tokens=max_new_tokens, **params),
        task=task,
        logprobs=logprobs,
        seed=seed,
        attempt=attempt,
        epoch=epoch,
        priority=priority,
        extra_key=extra_key,
        resume_ids=pack_ids(resume),
        return_hidden_states=hidden,
        return_routed_experts=routed_from is not None,
        routed_experts_start_len=routed_from or 0,
    )
    return Tokenized(request=request, prompt_ids=pack_ids(prompt), embeds=embeds)


def expected_output(
    prompt: Iterable[int], count: int, seed: int = 0, model: Callable[..., int] = next_token
) -> list[int]:
    """What the fake model answers."""
    ids = array("i", prompt)
    start = len(ids)
    for _ in range(count):
        ids.append(model(ids, VOCABULARY, seed))
    return list(ids[start:])


class Stepper:
    """Collects updates by rid and checks after every step that no page is lost and nothing follows a finish."""

    def __init__(self, depth: int = 0, model: Callable[..., int] = next_token, **changes: Any) -> None:
        settings = config(**changes)
        self.planner = Planner(settings)
        self.worker = FakeWorker(
            settings.page_size, settings.total_pages, settings.max_running, VOCABULARY, model=model
        )
        self.worker.recurrent = settings.snapshots is not None
        self.depth = depth
        self.in_flight: deque[tuple[Plan, Any]] = deque()
        self.updates: dict[str, list[Update]] = {}
        self.steps = 0

    def add(self, message: Tokenized, grammar: FakeGrammar | None = None) -> None:
        self.take(self.planner.add(message, float(self.steps), grammar))
        self.planner.check_invariants()

    def abort(self, rid: str, message: str = "") -> None:
        self.take(self.planner.abort(rid, message))
        self.forget()
        self.planner.check_invariants()

    def step(self) -> Plan | None:
        self.steps += 1
        plan = self.planner.next(float(self.steps))
        self.forget()
        if plan:
            self.in_flight.append((plan, self.worker.launch(plan)))
        while len(self.in_flight) > (self.depth if plan else 0):
            self.land()
        self.planner.check_invariants()
        return plan

    def land(self) -> None:
        """Take in the oldest step that is in flight."""
        plan, pending = self.in_flight.popleft()
        self.take(self.planner.apply(plan, self.worker.collect(pending), float(self.steps)))
        self.forget()

    def run(self, most_steps: int = 5000) -> None:
        """Until nothing is left; the pool must be whole then."""
        for _ in range(most_steps):
            if self.planner.idle:
                break
            self.step()
        assert self.planner.idle, (self.planner.waiting, self.planner.running)
        assert self.planner.audit() == ""

    def take(self, updates: list[Update]) -> None:
        for update in updates:
            seen = self.updates.setdefault(update.sequence.rid, [])
            assert not (seen and seen[-1].finish), f"an update of {update.sequence.rid} behind its last one"
            assert update.first == (not seen)
            seen.append(update)

    def forget(self) -> None:
        for sequence in self.planner.released:
            self.worker.forget(sequence)
        self.planner.released.clear()

    def output(self, rid: str) -> list[int]:
        return [token for update in self.updates[rid] for token in unpack_ids(update.ids)]

    def finish(self, rid: str) -> Finish | None:
        return self.updates[rid][-1].finish
