"""Overlap gives what plain scheduling gives: a step is launched before the tokens of the one before are seen."""

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.messages import LogprobOptions
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.launched_step import LaunchedStep
from tests.engine import ALL_LOGPROBS, Answer, Engine
from tests.model import tiny

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)
SHORT, MIDDLE, LONG = [5, 6, 7], list(range(20, 41)), [(7 * i) % 300 + 4 for i in range(90)]
PROMPTS = [SHORT, MIDDLE, LONG]

CASES = {
    "greedy": GREEDY,
    "seeded": SamplingParams(temperature=1.0, max_new_tokens=12),
    "filtered": SamplingParams(temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, max_new_tokens=12),
    "penalties": SamplingParams(
        temperature=0.8, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.3, max_new_tokens=16
    ),
    "least length": SamplingParams(temperature=1.5, min_new_tokens=6, max_new_tokens=12),
    "bias": SamplingParams(temperature=0.0, logit_bias={"9": 3.0, "10": -100.0}, max_new_tokens=12),
    "one token": SamplingParams(temperature=0.0, max_new_tokens=1),
}


class Overlapped(Engine):
    """Launches a step before it collects the last one, and asserts that launching waits for none."""

    def __init__(self, directory: Path, *, depth: int = 1, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self.worker.depth = self.depth = depth
        self.worker.can_jump = False  # as where a worker is made to overlap
        self.in_flight: deque[tuple[Plan, LaunchedStep]] = deque()
        self.steps_ahead = 0

    def step(self) -> bool:
        plan = self.planner.next(float(self.steps))
        self.forget()
        if plan:
            self.computed += [(share.sequence.rid, share.start, share.end) for share in plan.slices]
            self.in_flight.append((plan, self.worker.launch(plan)))
            self.steps_ahead += any(pending.drawn for _, pending in list(self.in_flight)[:-1])
        collected = False
        while len(self.in_flight) > (self.depth if plan else 0):
            self.collect_oldest(*self.in_flight.popleft())
            collected = True
        self.planner.check_invariants()
        self.steps += 1
        return collected or plan is not None

    def collect_oldest(self, plan: Plan, pending: LaunchedStep) -> None:
        self.take(self.planner.apply(plan, self.worker.collect(pending), float(self.steps)))
        self.forget()

    def forget(self) -> None:
        for sequence in self.planner.released:
            self.worker.forget(sequence)
        self.planner.released.clear()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3", tmp_path_factory.mktemp("overlap"))


def comparable(answer: Answer) -> tuple[Any, ...]:
    return answer.ids, answer.finish, answer.logprobs, answer.input_logprobs


def both(directory: Path, run: Any, **settings: Any) -> tuple[list[Answer], list[Answer], Overlapped]:
    """What a run gives plainly and overlapped."""
    plain, overlapped = Engine(directory, **settings), Overlapped(directory, **settings)
    return run(plain), run(overlapped), overlapped


@pytest.mark.parametrize("case", CASES)
def test_overlapped_requests_give_the_same_tokens_and_logprobs(directory, case):
    def run(engine: Engine) -> list[Answer]:
        options = LogprobOptions(top=2)
        rids = [engine.add(prompt, CASES[case], seed=40 + i, logprobs=options) for i, prompt in enumerate(PROMPTS)]
        engine.run()
        return [engine.answers[rid] for rid in rids]

    plain, overlapped, engine = both(directory, run, chunked_prefill_size=32)
    assert list(map(comparable, overlapped)) == list(map(comparable, plain))
    assert all(answer.finish for answer in overlapped)
    assert engine.steps_ahead or case in ("penalties", "one token")


def test_a_step_is_launched_before_the_last_one_is_seen_unless_the_host_must_look_back(directory):
    ahead = Overlapped(directory)
    ahead.generate([SHORT], GREEDY)
    assert ahead.steps_ahead == GREEDY.max_new_tokens - 1
    looking_back = Overlapped(directory)
    looking_back.generate([SHORT], CASES["penalties"])
    assert looking_back.steps_ahead == 0


def test_a_stop_id_ends_a_request_though_the_next_step_has_begun(directory):
    first = Engine(directory).generate(PROMPTS, GREEDY)
    stops = [answer.ids[3 + i] for i, answer in enumerate(first)]

    def run(engine: Engine) -> list[Answer]:
        each = [SamplingParams(temperature=0.0, max_new_tokens=12, stop_token_ids=[stop]) for stop in stops]
        return engine.generate(PROMPTS, each)

    plain, overlapped, _ = both(directory, run)
    assert list(map(comparable, overlapped)) == list(map(comparable, plain))
    assert all(answer.finish.reason == "stop" for answer in overlapped)


def test_an_abort_in_flight_ends_one_request_and_leaves_the_others_as_they_are(directory):
    expected = Engine(directory).generate(PROMPTS, GREEDY)
    engine = Overlapped(directory)
    rids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    for _ in range(5):
        engine.step()
    engine.take(engine.planner.abort(rids[1]))
    engine.run()
    answers = [engine.answers[rid] for rid in rids]
    assert (answers[0].ids, answers[2].ids) == (expected[0].ids, expected[2].ids)
    assert answers[1].finish.reason == "abort"
    assert answers[1].ids == expected[1].ids[: len(answers[1].ids)]


def test_retracted_requests_continue_with_the_same_tokens(directory):
    settings = ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "frequency_penalty": 0.7})
    each = [SamplingParams(max_new_tokens=60, ignore_eos=True, **setting) for setting in settings]
    prompts = [MIDDLE, MIDDLE[::-1], MIDDLE[1:]]
    expected = Engine(directory).generate(prompts, each)
    tight = Overlapped(directory, max_total_tokens=140)
    answers = tight.generate(prompts, each)
    assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
    assert sum(answer.retractions for answer in answers) > 0


def test_requests_that_arrive_later_share_steps_with_those_under_way(directory):
    def run(engine: Engine) -> list[Answer]:
        rids = []
        for i, prompt in enumerate([*PROMPTS, LONG, SHORT]):
            rids.append(engine.add(prompt, list(CASES.values())[i], seed=i, logprobs=ALL_LOGPROBS))
            engine.step()
            engine.step()
        engine.run()
        return [engine.answers[rid] for rid in rids]

    plain, overlapped, _ = both(directory, run, chunked_prefill_size=16)
    assert [answer.ids for answer in overlapped] == [answer.ids for answer in plain]
    assert [answer.finish for answer in overlapped] == [answer.finish for answer in plain]


def test_grammars_constrain_overlapped_steps(directory):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    constrained = SamplingParams(temperature=1.0, max_new_tokens=40, json_schema=json.dumps(schema))

    def run(engine: Engine) -> list[Answer]:
        return engine.generate([SHORT, MIDDLE], [constrained, GREEDY], seed=3)

    plain, overlapped, _ = both(directory, run)
    assert list(map(comparable, overlapped)) == list(map(comparable, plain))
