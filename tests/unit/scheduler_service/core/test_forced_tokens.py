"""The planner with tokens that a grammar forces: a step gives several of a request, and the next one computes them."""

from array import array
from typing import Any

import pytest

from quartet.runtime.messages import Finish
from quartet.scheduler_service.core.plan import Slice
from tests.fakes import FakeGrammar, next_token
from tests.stepper import VOCABULARY, Stepper, tokenized

PROMPT = [5, 6, 7, 8]


def jumping(**changes: Any) -> Stepper:
    stepper = Stepper(0, **changes)
    stepper.worker.jumps = True
    return stepper


def expected(prompt: list[int], count: int, grammar: FakeGrammar, seed: int = 0) -> list[int]:
    """What comes out one by one."""
    ids = array("i", prompt)
    for place in range(min(count, grammar.length)):
        ids.append(grammar.drawn(place, next_token(ids, VOCABULARY, seed)))
    return list(ids[len(prompt) :])


def slices(stepper: Stepper, rid: str) -> list[Slice]:
    return [part for plan in stepper.worker.plans for part in plan.slices if part.sequence.rid == rid]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_the_answer_is_the_one_token_by_token_in_fewer_steps(page_size: int) -> None:
    stepper, grammar = jumping(page_size=page_size, total_pages=400 // page_size), FakeGrammar(50)
    stepper.add(tokenized("a", PROMPT, 100), grammar)
    stepper.run()
    assert stepper.output("a") == expected(PROMPT, 100, grammar)
    assert stepper.finish("a") == Finish(reason="stop", matched=stepper.output("a")[-1], spoken=True)
    assert stepper.steps < 34  # two tokens of five are forced
    assert stepper.planner.stats.generation_tokens == 50


def test_forced_tokens_are_computed_with_the_drawn_one_in_front_of_them_behind_the_rows_of_one_token() -> None:
    stepper = jumping()
    stepper.add(tokenized("a", PROMPT, 10), FakeGrammar(50))
    stepper.add(tokenized("b", PROMPT[:2], 10))
    stepper.run()
    lengths = [part.end - part.start for part in slices(stepper, "a")]
    assert lengths == [4, 1, 3, 1, 1, 3]
    assert [part.end for part in slices(stepper, "a")] == [*[part.start for part in slices(stepper, "a")][1:], 13]
    for plan in stepper.worker.plans[1:]:
        several = [part.end > part.start + 1 for part in plan.slices]
        assert several == [False] * plan.decodes + [True] * plan.verifications
    assert any(plan.decodes and plan.verifications for plan in stepper.worker.plans)


@pytest.mark.parametrize("limit", range(1, 12))
def test_the_limit_ends_a_request_inside_a_forced_run(limit: int) -> None:
    stepper, grammar = jumping(), FakeGrammar(50)
    stepper.add(tokenized("a", PROMPT, limit), grammar)
    stepper.run()
    assert stepper.output("a") == expected(PROMPT, limit, grammar)
    assert stepper.finish("a") == Finish(reason="length", length=limit)


def test_a_stop_id_ends_a_request_inside_a_forced_run() -> None:
    grammar = FakeGrammar(50)
    whole = expected(PROMPT, 50, grammar)
    for place in (2, 3, 7, 8):
        stepper = jumping()
        stepper.add(tokenized("a", PROMPT, 50, stop_token_ids=[whole[place]]), grammar)
        stepper.run()
        assert stepper.output("a") == whole[: whole.index(whole[place]) + 1]
        assert stepper.finish("a") == Finish(reason="stop", matched=whole[place])


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("total", [80, 120])
def test_where_pages_are_short_forced_tokens_wait_and_nothing_is_lost(page_size: int, total: int) -> None:
    stepper = jumping(page_size=page_size, total_pages=total // page_size, max_running=8, chunked_prefill_size=16)
    stepper.planner.growth.START = 0.0  # let in more than can stay
    stepper.planner.growth.reset()
    prompts, grammar = [[20 + i, *PROMPT] for i in range(8)], FakeGrammar(40)
    for i, prompt in enumerate(prompts):
        stepper.add(tokenized(f"r{i}", prompt, 60, seed=i), grammar)
    stepper.run()
    for i, prompt in enumerate(prompts):
        assert stepper.output(f"r{i}") == expected(prompt, 60, grammar, i)
        for part in slices(stepper, f"r{i}"):
            assert part.end > part.start
    assert stepper.planner.stats.retractions > 0
    if page_size == 1:
        rows = [part for plan in stepper.worker.plans for part in plan.slices[: plan.decodes + plan.verifications]]
        assert any(not part.samples for part in rows)


def test_an_abort_while_forced_tokens_are_in_flight_frees_pages_once() -> None:
    stepper = jumping()
    stepper.add(tokenized("a", PROMPT, 50), FakeGrammar(50))
    while not (plan := stepper.planner.next(0.0)) or not plan.verifications:
        stepper.take(stepper.planner.apply(plan, stepper.worker.collect(stepper.worker.launch(plan)), 0.0))
    pending = stepper.worker.launch(plan)
    stepper.abort("a")
    stepper.take(stepper.planner.apply(plan, stepper.worker.collect(pending), 0.0))
    stepper.forget()
    assert stepper.planner.idle
    stepper.planner.check_invariants()


def test_a_later_request_finds_what_was_computed_of_forced_tokens() -> None:
    stepper, grammar = jumping(), FakeGrammar(30)
    stepper.add(tokenized("a", PROMPT, 50), grammar)
    stepper.run()
    ids = PROMPT + stepper.output("a")
    stepper.add(tokenized("b", ids, 20))  # the fake worker reads all of it back through the pages
    stepper.run()
    assert stepper.updates["b"][0].sequence.cached_tokens == len(ids) - 1
