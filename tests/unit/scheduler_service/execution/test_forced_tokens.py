"""Tokens that a grammar forces are taken without a draw, and the output stays what it was."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quartet.runtime.messages import pack_ids
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import MOST_BIAS
from quartet.scheduler_service.execution.worker import Worker
from tests.configs import resolved
from tests.engine import ALL_LOGPROBS, DEFAULTS, Answer, Engine
from tests.model import tiny
from tests.model.cases import VOCAB_SIZE
from tests.unit.scheduler_service.execution.test_constrained_drafts import (
    COOL,
    GRAMMARS,
    GREEDY,
    PROMPTS,
    answers,
    constrained,
)
from tests.unit.scheduler_service.execution.test_verification import same, with_drafts

MIXED = [GREEDY, COOL, GREEDY]
LONG_TEXT = "".join(chr(97 + i * i % 26) for i in range(150))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3", tmp_path_factory.mktemp("forced"))


def by_masks(directory: Path, **settings: Any) -> Engine:
    """An engine that draws every token behind a mask."""
    engine = Engine(directory, **settings)
    engine.worker.can_jump = False
    return engine


def fused_without_drafts(directory: Path, **settings: Any) -> Engine:
    """On the fused operations, whose decode steps take their tokens from the slots."""
    settings = {"max_total_tokens": 8192, **settings}
    config = resolved(model_path=str(directory), model_dir=str(directory), **DEFAULTS | settings)
    return Engine(directory, worker=Worker(config, model_info.load(config), implementation="torch"), **settings)


@pytest.mark.parametrize("kind", [Engine, fused_without_drafts])
@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("params", [GREEDY, COOL], ids=["greedy", "seeded"])
def test_requests_give_the_same_tokens_as_behind_masks(directory, grammar, params, kind):
    taken = answers(kind(directory), constrained(params, grammar), seed=3)
    same(taken, answers(by_masks(directory), constrained(params, grammar), seed=3))


def test_a_text_that_the_grammar_forces_takes_a_step_and_no_draw_for_each_of_its_tokens(directory):
    engine, masked = Engine(directory), by_masks(directory)
    params = constrained(GREEDY, "forced", max_new_tokens=300)
    same(answers(engine, params), answers(masked, params))
    assert engine.steps < masked.steps / 2


def test_a_long_forced_text_comes_in_several_steps(directory):
    params = msgspec.structs.replace(GREEDY, regex=LONG_TEXT, max_new_tokens=300)
    engine, masked = Engine(directory, context_length=512), by_masks(directory, context_length=512)
    taken = answers(engine, params)
    same(taken, answers(masked, params))
    assert taken[0].finish is not None and taken[0].finish.reason == "stop"
    assert 1 < max(end - start for _, start, end in engine.computed[len(PROMPTS) :]) <= 16 and engine.steps > 3


@pytest.mark.parametrize(("requests", "spare"), [(1, 15), (12, 4), (16, 0), (20, 12)])
def test_forced_tokens_fill_the_rows_that_are_computed_at_once(directory, requests, spare):
    engine = Engine(directory, max_running_requests=32)
    params = msgspec.structs.replace(GREEDY, regex=LONG_TEXT, max_new_tokens=60)
    for i in range(requests):
        engine.add([5 + i, *PROMPTS[0]], params)
    engine.step()
    before = len(engine.computed)
    most = 0
    while len(engine.planner.running) == requests and engine.step():
        lengths = [end - start for _, start, end in engine.computed[before:]]
        before = len(engine.computed)
        most = max(most, sum(lengths) - len(lengths))
    assert most == spare
    engine.run()
    engine.compiler.close()
    assert all(answer.finish for answer in engine.answers.values())


@pytest.mark.parametrize(
    "more",
    [
        {"min_new_tokens": 20},
        {"ignore_eos": True},
        {"top_k": 5, "top_p": 0.9},
        {"logit_bias": {"9": 5.0}},
        {"logit_bias": dict.fromkeys(map(str, range(VOCAB_SIZE)), -MOST_BIAS), "temperature": 1e-5},
        {"frequency_penalty": 0.7, "repetition_penalty": 1.2},
        {"stop_token_ids": list(range(40, 90))},
        *({"max_new_tokens": count} for count in range(1, 9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("params", [GREEDY, COOL], ids=["greedy", "seeded"])
def test_other_parameters_act_as_behind_masks(directory, params, more):
    for grammar in ("schema", "forced", "loops"):
        given = constrained(params, grammar, **more)
        same(answers(Engine(directory), given, seed=8), answers(by_masks(directory), given, seed=8))


def test_no_forced_token_ends_a_request_before_its_minimum(directory):
    text = {"regex": LONG_TEXT, "max_new_tokens": 60}
    whole = answers(Engine(directory), msgspec.structs.replace(GREEDY, **text))[0].ids
    for place in (0, 1, 5, 40):
        stops = [token for token in set(whole) if whole.index(token) >= place]
        given = msgspec.structs.replace(GREEDY, **text, min_new_tokens=30, stop_token_ids=stops)
        same(answers(Engine(directory), given), answers(by_masks(directory), given))


def test_of_a_very_long_forced_text_a_step_takes_few_tokens(directory):
    """The matcher looks at all of it for each: a step would take as long as sixteen."""
    text = {"json_schema": json.dumps({"const": LONG_TEXT * 60}), "max_new_tokens": 20}
    engine = Engine(directory)
    taken = answers(engine, msgspec.structs.replace(GREEDY, **text))
    same(taken, answers(by_masks(directory), msgspec.structs.replace(GREEDY, **text)))
    assert max(end - start for _, start, end in engine.computed[len(PROMPTS) :]) == 2


def test_logprobs_are_those_of_the_masked_distribution(directory):
    for grammar in ("schema", "forced", "free"):
        params = constrained(GREEDY, grammar)
        told = answers(Engine(directory), params, logprobs=ALL_LOGPROBS)
        same(told, answers(by_masks(directory), params, logprobs=ALL_LOGPROBS))
        same(answers(Engine(directory), params), [without_logprobs(answer) for answer in told])


def without_logprobs(answer: Answer) -> Answer:
    """Without its logprobs."""
    return Answer(ids=answer.ids, finish=answer.finish)


def test_retracted_requests_continue_with_the_same_tokens(directory):
    each = [constrained(params, grammar, ignore_eos=True) for params, grammar in zip(MIXED, GRAMMARS, strict=False)]
    tight = Engine(directory, max_total_tokens=140)
    tight.planner.growth.ratio = 0.0  # let in more than can stay
    taken = answers(tight, each, seed=2)
    same(taken, answers(by_masks(directory), each, seed=2))
    assert sum(answer.retractions for answer in taken) > 0


def test_a_request_that_comes_again_amid_a_forced_text_goes_on_with_the_same_tokens(directory):
    params = constrained(COOL, "forced")
    whole = answers(Engine(directory), params, seed=9)
    engine = Engine(directory)
    for prompt, answer in zip(PROMPTS, whole, strict=True):
        for kept in range(1, len(answer.ids)):
            rid = engine.add(prompt, params, seed=9, attempt=1, resume_ids=pack_ids(answer.ids[:kept]))
            engine.run()
            assert answer.ids[:kept] + engine.answers[rid].ids == answer.ids
    engine.compiler.close()


def test_a_step_that_fails_is_computed_again_with_the_same_tokens(directory):
    params = [constrained(one, "forced") for one in MIXED]
    plain = answers(by_masks(directory), params, seed=4)
    engine = Engine(directory)
    collect: Callable[[Any], Any] = engine.worker.collect
    launch: Callable[[Any], Any] = engine.worker.launch
    plans: list[Any] = []

    def noting(plan: Any) -> Any:
        plans.append(plan)
        return launch(plan)

    def failing(launched: Any) -> Any:
        results = collect(launched)
        if len(plans) % 3 == 0:  # its grammars have taken the tokens, which are lost
            engine.worker.reset()
            return collect(launch(plans[-1]))
        return results

    engine.worker.launch, engine.worker.collect = noting, failing
    same(answers(engine, params, seed=4), plain)


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1"])
def test_a_model_with_recurrent_layers_draws_each_token(family, tmp_path):
    path = tiny.build(family, tmp_path)
    engine = Engine(path)
    taken = answers(engine, constrained(GREEDY, "forced"))
    assert not engine.worker.can_jump
    assert all(end - start == 1 for _, start, end in engine.computed[len(PROMPTS) :])
    assert all(answer.ids for answer in taken)


def test_with_drafts_the_forced_text_is_drafted(directory):
    assert not with_drafts(directory).worker.can_jump


def deterministic(directory: Path, **settings: Any) -> Engine:
    return Engine(directory, enable_deterministic_inference=True, **settings)


@pytest.mark.parametrize("kind", [Engine, fused_without_drafts, deterministic])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_traffic_with_grammars_is_answered_as_behind_masks(directory, kind, seed):
    def run(engine: Engine) -> list[Answer]:
        draw = random.Random(seed)
        rids = []
        for i in range(16):
            prompt = draw.choice(PROMPTS)[draw.randrange(20) :]
            params = draw.choice(MIXED)
            if draw.random() < 0.8:
                params = constrained(params, draw.choice([*GRAMMARS]), min_new_tokens=draw.choice([0, 0, 5]))
            params = msgspec.structs.replace(params, max_new_tokens=draw.randrange(1, 50))
            rids.append(engine.add(prompt, params, seed=i, logprobs=draw.choice([None, None, ALL_LOGPROBS])))
            for _ in range(draw.randrange(6)):
                engine.step()
        engine.run()
        engine.compiler.close()
        return [engine.answers[rid] for rid in rids]

    engine = kind(directory, max_total_tokens=400, chunked_prefill_size=16)
    same(run(engine), run(by_masks(directory, max_total_tokens=4000, chunked_prefill_size=16)))
