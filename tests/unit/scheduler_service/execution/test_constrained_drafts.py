"""With drafts a grammar lets through what it lets through without them, and a request gets the same tokens."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quartet.runtime.messages import LogprobOptions, pack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.grammar.matchers import Matcher
from tests.engine import ALL_LOGPROBS, Answer, Engine
from tests.model import tiny
from tests.unit.scheduler_service.execution.test_verification import fused, same, with_drafts

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "number": {"type": "integer"}},
        "required": ["colour", "number"],
        "additionalProperties": False,
    },
    "minItems": 4,
    "maxItems": 4,
}
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=60)
COOL = SamplingParams(temperature=0.3, max_new_tokens=60)
GRAMMARS: dict[str, dict[str, str]] = {
    "schema": {"json_schema": json.dumps(SCHEMA)},
    "forced": {"regex": "(The quick brown fox [a-c]{2}; ){3}end"},
    "loops": {"regex": "([ab]{1,2}c)+"},
    "finite": {"regex": "[0-9]{7,9}"},
    "free": {"regex": "(.|\n)*"},
    "ebnf": {"ebnf": 'root ::= "[" item ("," item){5} "]"\nitem ::= [0-9]+ | "[" item "]"'},
}
PROMPTS = [[5, 6, 7] * 8, list(range(20, 41)) * 2, [9] * 30]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3", tmp_path_factory.mktemp("constrained"))


def constrained(params: SamplingParams, grammar: str, **more: Any) -> SamplingParams:
    return msgspec.structs.replace(params, **GRAMMARS[grammar], **more)


def answers(engine: Engine, params: list[SamplingParams] | SamplingParams, **request: Any) -> list[Answer]:
    try:
        return engine.generate(PROMPTS, params, **request)
    finally:
        engine.compiler.close()


@pytest.mark.parametrize("kind", [with_drafts, fused])
@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("params", [GREEDY, COOL], ids=["greedy", "seeded"])
def test_constrained_requests_give_the_same_tokens_and_logprobs_with_drafts(directory, grammar, params, kind):
    options = LogprobOptions(top=2, token_ids=[8, 9])
    engine = kind(directory)
    drafted = answers(engine, constrained(params, grammar), seed=3, logprobs=options)
    plain = answers(Engine(directory), constrained(params, grammar), seed=3, logprobs=options)
    same(drafted, plain)
    assert engine.planner.stats.proposed_drafts > 0


def test_a_text_that_the_grammar_forces_takes_fewer_steps(directory):
    engine = with_drafts(directory)
    bias = {str(token): 30.0 for token in engine.compiler.compile("regex", "The quick brown fox").guide().forced()}
    params = constrained(GREEDY, "forced", logit_bias=bias)
    plain = Engine(directory)
    plain.worker.can_jump = False
    same(answers(engine, params), answers(plain, params))
    assert engine.planner.stats.correct_drafts > 10
    assert engine.steps < plain.steps


def test_no_draft_is_computed_that_the_grammar_refuses(directory):
    """The prompt repeats letters, and only digits are allowed: what followed them before is never drafted."""
    engine = with_drafts(directory)
    answers(engine, constrained(GREEDY, "finite", max_new_tokens=1))
    assert engine.planner.stats.proposed_drafts == 0


@pytest.mark.parametrize(
    "more",
    [{"min_new_tokens": 20}, {"ignore_eos": True}, {"top_k": 5, "top_p": 0.9}, {"logit_bias": {"9": 5.0}}],
    ids=str,
)
def test_other_parameters_act_as_without_drafts(directory, more):
    for grammar in ("schema", "loops", "free"):
        params = constrained(COOL, grammar, **more)
        engine = with_drafts(directory)
        same(answers(engine, params, seed=8), answers(Engine(directory), params, seed=8))


@pytest.mark.parametrize("kind", [with_drafts, fused])
def test_a_stop_id_inside_an_accepted_run_ends_the_request_there(directory, kind):
    params = constrained(GREEDY, "loops")
    first = answers(Engine(directory), params)
    for place in range(20, 40, 5):
        each = [msgspec.structs.replace(params, stop_token_ids=[answer.ids[place]]) for answer in first]
        same(
            answers(kind(directory), each, logprobs=ALL_LOGPROBS),
            answers(Engine(directory), each, logprobs=ALL_LOGPROBS),
        )


@pytest.mark.parametrize("kind", [with_drafts, fused])
def test_retracted_requests_continue_with_the_same_tokens(directory, kind):
    each = [constrained(params, "loops", ignore_eos=True) for params in (GREEDY, COOL, GREEDY)]
    tight = kind(directory, max_total_tokens=140)
    tight.planner.growth.ratio = 0.0  # let in more than can stay
    drafted = answers(tight, each, seed=2)
    same(drafted, answers(Engine(directory), each, seed=2))
    assert sum(answer.retractions for answer in drafted) > 0
    assert tight.planner.stats.correct_drafts > 0


def test_a_request_that_comes_again_goes_on_with_the_same_tokens(directory):
    params = constrained(COOL, "schema")
    whole = answers(Engine(directory), params, seed=9)
    engine = with_drafts(directory)
    for prompt, answer in zip(PROMPTS, whole, strict=True):
        for kept in (1, 7, len(answer.ids) - 1):
            rid = engine.add(prompt, params, seed=9, attempt=1, resume_ids=pack_ids(answer.ids[:kept]))
            engine.run()
            assert answer.ids[:kept] + engine.answers[rid].ids == answer.ids
    engine.compiler.close()


def test_a_step_that_fails_is_computed_again_with_the_same_tokens(directory):
    """A new matcher is made of the tokens that were sent, not of those that the failed step had drawn."""
    params = constrained(COOL, "schema")
    plain = answers(Engine(directory), params, seed=4)
    engine = with_drafts(directory)
    collect: Callable[[Any], Any] = engine.worker.collect
    failures = iter([False] * 3 + [True] + [False] * 4 + [True])

    def failing(launched: Any) -> Any:
        results = collect(launched)
        if next(failures, False):
            engine.worker.reset()
            return collect(engine.worker.launch(engine.plan))
        return results

    launch: Callable[[Any], Any] = engine.worker.launch

    def noting(plan: Any) -> Any:
        engine.plan = plan
        return launch(plan)

    engine.worker.launch, engine.worker.collect = noting, failing
    same(answers(engine, params, seed=4), plain)


@pytest.mark.parametrize("kind", [with_drafts, fused])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_traffic_with_grammars_is_answered_as_without_drafts(directory, kind, seed):
    def run(engine: Engine) -> list[Answer]:
        draw = random.Random(seed)
        rids = []
        for i in range(12):
            prompt = draw.choice(PROMPTS)[draw.randrange(20) :]
            params = draw.choice([GREEDY, COOL])
            if draw.random() < 0.8:
                params = constrained(params, draw.choice([*GRAMMARS]), min_new_tokens=draw.choice([0, 0, 5]))
            params = msgspec.structs.replace(params, max_new_tokens=draw.randrange(1, 50))
            options = draw.choice([None, ALL_LOGPROBS, LogprobOptions(top=3)])
            rids.append(engine.add(prompt, params, seed=i, logprobs=options))
            for _ in range(draw.randrange(6)):
                engine.step()
        engine.run()
        engine.compiler.close()
        return [engine.answers[rid] for rid in rids]

    engine = kind(directory, max_total_tokens=400, chunked_prefill_size=16)
    same(run(engine), run(Engine(directory, max_total_tokens=4000, chunked_prefill_size=16)))
    assert engine.planner.stats.correct_drafts > 0


def test_a_matcher_that_looking_at_drafts_is_too_much_for_is_made_anew(directory):
    class TooCostly:
        """An engine that fails at every draft."""

        def __init__(self, engine: Any) -> None:
            self._engine = engine
            self.broken = False

        def unsafe_compute_mask_ptr_with_draft_token(self, *given: Any) -> None:
            self.broken = True

        def is_error(self) -> bool:
            return self.broken or bool(self._engine.is_error())

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

    params = constrained(GREEDY, "loops")
    plain = answers(Engine(directory), params)
    engine = with_drafts(directory)
    compile_: Callable[..., Any] = engine.compiler.compile

    def fragile(kind: str, text: str) -> Any:
        grammar = compile_(kind, text)
        make: Callable[..., Matcher] = grammar.matcher
        grammar.matcher = lambda ids=(): Matcher(TooCostly(make(ids).engine))
        return grammar

    engine.compiler.compile = fragile
    drafted = answers(engine, params)
    same(drafted, plain)
    assert engine.planner.stats.proposed_drafts > 0 and engine.planner.stats.correct_drafts == 0


def test_a_device_beside_the_cpu_computes_while_its_masks_are_made(directory, monkeypatch):
    engine, events = with_drafts(directory), []
    monkeypatch.setattr(Worker, "is_apart", True)
    run, start = engine.worker.steps.run, engine.worker.constraints.masks.start
    monkeypatch.setattr(engine.worker.steps, "run", lambda step: events.append("step") or run(step))
    monkeypatch.setattr(
        engine.worker.constraints.masks, "start", lambda *args, **how: events.append("masks") or start(*args, **how)
    )
    params = constrained(GREEDY, "schema")
    found = answers(engine, params)
    monkeypatch.undo()
    same(found, answers(Engine(directory), params))
    assert events == ["step", "masks"] * (len(events) // 2)
