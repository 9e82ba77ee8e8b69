"""Any order of adding, aborting, stepping, flushing, pausing and failing keeps page counts and tokens right."""

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Finish, LogprobOptions, unpack_ids
from quartet.scheduler_service.core.drafts import DraftOptions
from quartet.scheduler_service.core.plan import NAN_HAPPENED
from quartet.scheduler_service.core.snapshots import SnapshotOptions
from tests.fakes import looping_token, next_token
from tests.stepper import Stepper, expected_output, tokenized

POOL_TOKENS = 192
STEMS = [[7] * 40, [7] * 20 + [8] * 30, list(range(100, 170)), [9]]  # prompts begin alike in many ways


class PlannerMachine(RuleBasedStateMachine):
    """The planner with a fake worker in a pool so small that it evicts and retracts all the time."""

    @initialize(
        page_size=st.sampled_from([1, 4, 16]),
        depth=st.sampled_from([0, 1]),
        chunk=st.sampled_from([-1, 3, 16, 64]),
        policy=st.sampled_from(["fcfs", "lpm", "priority"]),
        expects_no_output=st.booleans(),
        drafts=st.sampled_from([None, DraftOptions(4, 1, 3), DraftOptions(40, 2, 8)]),
        snapshots=st.sampled_from([None, SnapshotOptions(0, 16), SnapshotOptions(3, 16), SnapshotOptions(60, 32)]),
        preemption=st.fixed_dictionaries(
            {"preemption_threshold": st.sampled_from([None, 0, 1]), "low_values_first": st.booleans()}
        ),
    )
    def build(
        self,
        page_size: int,
        depth: int,
        chunk: int,
        policy: str,
        expects_no_output: bool,
        drafts: DraftOptions | None,
        snapshots: SnapshotOptions | None,
        preemption: dict[str, Any],
    ) -> None:
        if policy != "priority":  # as in assemble.py: who is preempted for must be the next to be admitted
            preemption["preemption_threshold"] = None
        drafts = None if snapshots else drafts  # as the worker has it
        self.model = looping_token if drafts else next_token
        self.stepper = Stepper(
            0 if drafts else depth,
            self.model,
            drafts=drafts,
            snapshots=snapshots,
            page_size=page_size,
            total_pages=POOL_TOKENS // page_size,
            chunked_prefill_size=chunk,
            max_prefill_tokens=100,
            policy=policy,
            max_running=5,
            max_queued=12,
            context_length=150,
            running_timeout_s=30,
            **preemption,
        )
        if expects_no_output:
            self.stepper.planner.growth.START = 0.0
            self.stepper.planner.growth.reset()
        self.prompts: dict[str, tuple[list[int], int]] = {}

    @rule(
        stem=st.sampled_from(STEMS),
        cut=st.integers(1, 70),
        tail=st.lists(st.integers(2, 999), max_size=10),
        limit=st.one_of(st.none(), st.integers(0, 60)),
        start=st.sampled_from([-1, -1, 0, 5]),
        extra=st.fixed_dictionaries(
            {
                "extra_key": st.sampled_from(["", "", "x"]),
                "priority": st.integers(0, 2),
                "task": st.sampled_from(["generate", "generate", "generate", "embed"]),
                "seed": st.integers(0, 3),
            }
        ),
    )
    def add(
        self, stem: list[int], cut: int, tail: list[int], limit: int | None, start: int, extra: dict[str, Any]
    ) -> None:
        rid, prompt = f"r{len(self.prompts)}", stem[:cut] + tail
        options = LogprobOptions(start=min(start, len(prompt))) if start >= 0 else None
        try:
            self.stepper.add(tokenized(rid, prompt, limit, logprobs=options, **extra))
        except RequestError:
            return
        self.prompts[rid] = prompt, extra["seed"]

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.stepper.step()

    @rule()
    def launch_without_landing(self) -> None:
        """Leave a step in flight, so that the next operation meets it."""
        plan = self.stepper.planner.next(0.0) if len(self.stepper.in_flight) < self.stepper.depth else None
        self.stepper.forget()
        if plan:
            self.stepper.in_flight.append((plan, self.stepper.worker.launch(plan)))

    @rule(pick=st.integers(0, 1000))
    def abort(self, pick: int) -> None:
        if live := list(self.stepper.planner.live):
            self.stepper.abort(live[pick % len(live)])

    @rule(pick=st.integers(0, 1000))
    def fail(self, pick: int) -> None:
        if live := list(self.stepper.planner.live):
            self.stepper.worker.faults[live[pick % len(live)]] = NAN_HAPPENED

    @rule()
    def expire(self) -> None:
        self.stepper.take(self.stepper.planner.expire(float(self.stepper.steps)))
        self.stepper.forget()

    @rule()
    def flush(self) -> None:
        self.stepper.planner.forget_prefixes()

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.stepper.planner.paused = paused

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        if hasattr(self, "stepper"):
            self.stepper.planner.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "stepper"):
            return
        self.stepper.planner.paused = False
        while self.stepper.in_flight:
            self.stepper.land()
        self.stepper.run()
        for rid, (prompt, seed) in self.prompts.items():
            output = self.stepper.output(rid)
            assert output == expected_output(prompt, len(output), seed, self.model)
            assert self.stepper.finish(rid) is not None
            self.check_prompt_logprobs(rid, prompt)

    def check_prompt_logprobs(self, rid: str, prompt: list[int]) -> None:
        first = self.stepper.updates[rid][0]
        options = first.sequence.request.logprobs
        if options and (first.ids or first.vector):
            assert first.input_logprobs is not None
            assert list(unpack_ids(first.input_logprobs.ids)) == prompt[options.start :]


PlannerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPlannerMachine = PlannerMachine.TestCase


def serve(prompts: list[list[int]], **changes: Any) -> tuple[list[list[int]], list[Finish | None], int]:
    stepper = Stepper(chunked_prefill_size=32, **changes)
    for i, prompt in enumerate(prompts):
        stepper.add(tokenized(f"r{i}", prompt, 40, seed=i))
    stepper.run()
    rids = [f"r{i}" for i in range(len(prompts))]
    return list(map(stepper.output, rids)), list(map(stepper.finish, rids)), stepper.planner.stats.retractions


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("depth", [0, 1])
def test_64_requests_give_the_same_tokens_one_by_one_together_and_retracted(page_size: int, depth: int) -> None:
    draw = random.Random(7)
    prompts = [[*draw.choice(STEMS)[: draw.randrange(1, 60)], draw.randrange(2, 999)] for _ in range(64)]
    together = serve(prompts, depth=depth, page_size=page_size, total_pages=9600 // page_size, max_running=64)
    squeezed = serve(prompts, depth=depth, page_size=page_size, total_pages=640 // page_size, max_running=64)
    assert together[2] == 0
    assert squeezed[2] > 0
    assert squeezed[:2] == together[:2]
    assert together[0] == [expected_output(prompt, 40, i) for i, prompt in enumerate(prompts)]
