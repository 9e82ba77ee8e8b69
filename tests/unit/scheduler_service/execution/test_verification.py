"""With drafts a model answers as without: the same tokens, ends and logprobs, in fewer steps where text repeats."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from quartet.runtime.messages import LogprobOptions, Logprobs, pack_ids, unpack_ids
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.verification import accepted
from quartet.scheduler_service.execution.worker import Worker
from tests.configs import resolved
from tests.engine import ALL_LOGPROBS, Answer, Engine, floats
from tests.model import tiny
from tests.unit.scheduler_service.test_overlap import CASES as PLAIN_CASES

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=40)
COOL = SamplingParams(temperature=0.25, max_new_tokens=40)
CASES = {**PLAIN_CASES, "cool": COOL, "cool and filtered": msgspec.structs.replace(COOL, top_k=20, top_p=0.95)}
PROMPTS = [[5, 6, 7] * 8, list(range(20, 41)) * 2, [9] * 30]
LONG = [(7 * i) % 300 + 4 for i in range(90)]
NGRAM: dict[str, Any] = {"speculative_algorithm": "NGRAM", "speculative_ngram_min_match_window_size": 1}


def with_drafts(directory: Path, **settings: Any) -> Engine:
    return Engine(directory, **NGRAM, **settings)


def fused(directory: Path, **settings: Any) -> Engine:
    """The same on the fused operations, whose decode steps take their tokens from the slots."""
    settings = {"dtype": "float32", "page_size": 4, "max_total_tokens": 8192, "device": "cpu", **NGRAM, **settings}
    config = resolved(model_path=str(directory), model_dir=str(directory), max_running_requests=12, **settings)
    return Engine(directory, worker=Worker(config, model_info.load(config), implementation="torch"), **settings)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3", tmp_path_factory.mktemp("speculation"))


def told(answer: Answer) -> tuple[Any, ...]:
    return answer.ids, answer.finish


def close(left: Logprobs | None, right: Logprobs | None) -> None:
    assert left is not None and right is not None
    assert unpack_ids(left.ids) == unpack_ids(right.ids)
    assert left.top_ids == right.top_ids
    for name in ("values", "top_values", "asked_values"):
        ours, theirs = torch.tensor(floats(getattr(left, name))), torch.tensor(floats(getattr(right, name)))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, equal_nan=True)


def same(drafted: list[Answer], plain: list[Answer]) -> None:
    assert list(map(told, drafted)) == list(map(told, plain))
    for left, right in zip(drafted, plain, strict=True):
        if right.logprobs is not None:
            close(left.logprobs, right.logprobs)


@pytest.mark.parametrize("kind", [with_drafts, fused])
@pytest.mark.parametrize("case", CASES)
def test_drafted_requests_give_the_same_tokens_and_logprobs(directory, case, kind):
    def run(engine: Engine) -> list[Answer]:
        options = LogprobOptions(top=2, token_ids=[8, 9])
        rids = [engine.add(prompt, CASES[case], seed=40 + i, logprobs=options) for i, prompt in enumerate(PROMPTS)]
        engine.run()
        return [engine.answers[rid] for rid in rids]

    engine = kind(directory, chunked_prefill_size=32)
    same(run(engine), run(Engine(directory, chunked_prefill_size=32)))
    assert (engine.planner.stats.proposed_drafts > 0) == (case not in ("penalties", "one token"))
    assert engine.planner.stats.correct_drafts > 0 or not case.startswith(("greedy", "cool"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mistral", "mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_every_kind_of_model_verifies_its_drafts(family, tmp_path):
    path = tiny.build(family, tmp_path)
    plain = Engine(path).generate([*PROMPTS, LONG], [GREEDY, COOL, GREEDY, COOL], seed=5)
    for engine in (with_drafts(path), fused(path)):
        same(engine.generate([*PROMPTS, LONG], [GREEDY, COOL, GREEDY, COOL], seed=5), plain)
        assert engine.planner.stats.correct_drafts >= 10


@pytest.mark.parametrize(
    "settings",
    [{"page_size": 1}, {"page_size": 16}, {"chunked_prefill_size": 7}, {"disable_radix_cache": True}],
    ids=str,
)
def test_page_and_chunk_sizes_do_not_change_the_answer(directory, settings):
    plain = Engine(directory).generate([*PROMPTS, LONG], GREEDY)
    engine = with_drafts(directory, **settings)
    same(engine.generate([*PROMPTS, LONG], GREEDY), plain)
    assert engine.planner.stats.correct_drafts > 10


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_drafts_may_be_short_or_long(directory, tokens):
    plain = Engine(directory).generate(PROMPTS, GREEDY)
    engine = with_drafts(directory, speculative_num_draft_tokens=tokens)
    same(engine.generate(PROMPTS, GREEDY), plain)
    assert max(end - start for _, start, end in engine.computed if start >= 42) <= 1 + tokens


@pytest.mark.parametrize("kind", [with_drafts, fused])
def test_retracted_requests_continue_with_the_same_tokens(directory, kind):
    each = [msgspec.structs.replace(params, max_new_tokens=60, ignore_eos=True) for params in (GREEDY, COOL, GREEDY)]
    plain = Engine(directory).generate(PROMPTS, each)
    tight = kind(directory, max_total_tokens=160)
    answers = tight.generate(PROMPTS, each)
    same(answers, plain)
    assert sum(answer.retractions for answer in answers) > 0
    assert tight.planner.stats.correct_drafts > 10


@pytest.mark.parametrize("kind", [with_drafts, fused])
def test_a_stop_id_inside_an_accepted_run_ends_the_request_there(directory, kind):
    first = Engine(directory).generate(PROMPTS, GREEDY)
    for place in range(20, 40, 3):
        each = [msgspec.structs.replace(GREEDY, stop_token_ids=[answer.ids[place]]) for answer in first]
        same(
            kind(directory).generate(PROMPTS, each, logprobs=ALL_LOGPROBS),
            Engine(directory).generate(PROMPTS, each, logprobs=ALL_LOGPROBS),
        )


@pytest.mark.parametrize("kind", [with_drafts, fused])
def test_an_abort_ends_one_request_and_leaves_the_others_as_they_are(directory, kind):
    expected = Engine(directory).generate(PROMPTS, GREEDY)
    engine = kind(directory)
    rids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    for _ in range(8):
        engine.step()
    engine.take(engine.planner.abort(rids[1]))
    engine.run()
    answers = [engine.answers[rid] for rid in rids]
    same([answers[0], answers[2]], [expected[0], expected[2]])
    assert answers[1].finish.reason == "abort"
    assert answers[1].ids == expected[1].ids[: len(answers[1].ids)]


@pytest.mark.parametrize("kind", [with_drafts, fused])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_traffic_is_answered_as_without_drafts(directory, kind, seed):
    """Requests come and go beside each other, in a pool so small that they are retracted; the books are checked."""
    cases = [*CASES.values()]

    def run(engine: Engine) -> list[Answer]:
        draw = random.Random(seed)
        rids = []
        for i in range(12):
            prompt = draw.choice([*PROMPTS, LONG])[draw.randrange(20) :]
            params = msgspec.structs.replace(draw.choice(cases), max_new_tokens=draw.randrange(1, 50))
            options = draw.choice([None, ALL_LOGPROBS, LogprobOptions(top=3)])
            rids.append(engine.add(prompt, params, seed=i, logprobs=options))
            for _ in range(draw.randrange(6)):
                engine.step()
        engine.run()
        return [engine.answers[rid] for rid in rids]

    engine = kind(directory, max_total_tokens=400, chunked_prefill_size=16)
    same(run(engine), run(Engine(directory, max_total_tokens=4000, chunked_prefill_size=16)))
    assert engine.planner.stats.correct_drafts > 0


def test_a_request_that_comes_again_goes_on_with_the_same_tokens(directory):
    whole = Engine(directory).generate(PROMPTS, COOL, seed=9)
    engine = with_drafts(directory)
    for prompt, answer in zip(PROMPTS, whole, strict=True):
        rid = engine.add(prompt, COOL, seed=9, attempt=1, resume_ids=pack_ids(answer.ids[:15]))
        engine.run()
        assert answer.ids[:15] + engine.answers[rid].ids == answer.ids


@pytest.mark.parametrize(
    ("drafts", "tokens", "valid", "count"),
    [
        ((), [4], [True], 1),
        ((4, 5), [4, 5, 6], [True] * 3, 3),
        ((4, 5), [4, 9, 6], [True] * 3, 2),
        ((4, 5), [9, 5, 6], [True] * 3, 1),
        ((4, 5), [4, 5, 0], [True, True, False], 2),
        ((4, 5), [4, 0, 6], [True, False, True], 1),
    ],
)
def test_tokens_count_up_to_the_first_behind_a_wrong_draft_and_before_the_first_that_is_none(
    drafts, tokens, valid, count
):
    assert accepted(drafts, tokens, valid) == count


def test_a_plain_plan_is_recorded_and_one_that_verifies_is_not(directory):
    engine = fused(directory)
    plans: list[Plan] = []
    launch: Callable[[Plan], Any] = engine.worker.launch
    engine.worker.launch = lambda plan: plans.append(plan) or launch(plan)
    engine.generate(PROMPTS, GREEDY)
    decodes = [plan for plan in plans if not plan.prefills]
    ran = engine.worker.steps.graphs.misses
    assert sum(plan.verifications > 0 for plan in decodes) > 3
    assert sum(ran.values()) <= sum(not plan.verifications for plan in decodes)
    assert engine.worker.depth == 0
