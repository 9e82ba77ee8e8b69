"""The planner with drafts: a step may give several tokens of a request, and the answers are those without drafts."""

import random
from typing import Any

import pytest

from quartet.runtime.messages import Drafts, Finish, LogprobOptions, unpack_ids
from quartet.scheduler_service.core.drafts import DraftOptions
from quartet.scheduler_service.core.plan import Plan
from tests.fakes import FakeGrammar, looping_token, scored
from tests.stepper import Stepper, expected_output, tokenized

OPTIONS = DraftOptions(max_tokens=8, min_match=2, max_match=8)
LOOP = [2, 3, 4, 5, 6, 7, 8] * 2


def drafting(**changes: Any) -> Stepper:
    return Stepper(0, looping_token, **{"drafts": OPTIONS, **changes})


def expected(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    return expected_output(prompt, count, seed, looping_token)


def verifying(stepper: Stepper) -> Plan:
    """Step until a plan verifies drafts."""
    while not (plan := stepper.step()) or not plan.verifications:
        assert not stepper.planner.idle
    return plan


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_the_answer_is_the_one_without_drafts_in_fewer_steps(page_size: int) -> None:
    stepper = drafting(page_size=page_size, total_pages=400 // page_size)
    stepper.add(tokenized("a", LOOP, 200))
    stepper.run()
    assert stepper.output("a") == expected(LOOP, 200)
    assert stepper.steps < 120
    assert stepper.planner.stats.correct_drafts > 80


def test_without_the_option_nothing_is_drafted() -> None:
    stepper = drafting(drafts=None)
    stepper.add(tokenized("a", LOOP, 50))
    stepper.run()
    assert stepper.steps == 50
    assert not any(update.drafts for update in stepper.updates["a"])


def test_decode_rows_come_first_then_verifications_then_prompts() -> None:
    stepper = drafting(chunked_prefill_size=16)
    stepper.add(tokenized("loops", LOOP, 100))
    stepper.add(tokenized("penalised", [30], 100, frequency_penalty=1.0))
    verifying(stepper)
    stepper.add(tokenized("late", range(100, 180), 1))
    plan = verifying(stepper)
    assert (plan.decodes, plan.verifications, len(plan.prefills)) == (1, 1, 1)
    decode, verification, prefill = plan.slices
    assert (decode.sequence.rid, verification.sequence.rid, prefill.sequence.rid) == ("penalised", "loops", "late")
    assert verification.end == verification.start + 1 + len(verification.drafts)
    assert plan.tokens <= 16


def test_an_update_of_a_verification_has_the_counts_of_proposed_and_correct_drafts() -> None:
    stepper = drafting()
    stepper.add(tokenized("a", LOOP, 60, logprobs=LogprobOptions()))
    stepper.run()
    first, *others = stepper.updates["a"]
    assert first.drafts is None
    sent = [update.drafts for update in others]
    assert all(isinstance(drafts, Drafts) for drafts in sent)
    assert sum(drafts.correct for drafts in sent) == 60 - len(stepper.updates["a"])
    assert sum(drafts.proposed for drafts in sent) == stepper.planner.stats.proposed_drafts
    for update in stepper.updates["a"]:
        assert update.logprobs == scored(unpack_ids(update.ids))


@pytest.mark.parametrize("limit", range(14, 26))
def test_no_token_is_computed_beyond_the_limit(limit: int) -> None:
    stepper = drafting()
    stepper.add(tokenized("a", LOOP, limit))
    stepper.run()
    assert stepper.output("a") == expected(LOOP, limit)
    assert stepper.finish("a") == Finish(reason="length", length=limit)
    assert max(part.end for plan in stepper.worker.plans for part in plan.slices) < len(LOOP) + limit


def test_a_stop_id_inside_an_accepted_run_ends_the_request_there() -> None:
    whole = expected(LOOP, 60)
    stops = {token for token in whole if token > 8} or {8}
    for stop in stops | {6}:
        stepper = drafting()
        stepper.add(tokenized("a", LOOP, 60, stop_token_ids=[stop], logprobs=LogprobOptions()))
        stepper.run()
        assert stepper.output("a") == whole[: whole.index(stop) + 1]
        assert stepper.finish("a") == Finish(reason="stop", matched=stop)
        for update in stepper.updates["a"]:
            assert update.logprobs == scored(unpack_ids(update.ids))


def test_what_was_computed_of_wrong_drafts_is_never_found_again() -> None:
    stepper = drafting(total_pages=4000)
    stepper.add(tokenized("a", LOOP, 100))
    stepper.run()
    ids = LOOP + stepper.output("a")
    stepper.add(tokenized("b", ids, 50))  # the fake worker reads all of it back through the pages
    stepper.run()
    assert stepper.output("b") == expected(ids, 50)
    assert stepper.updates["b"][0].sequence.cached_tokens == len(ids) - 1
    assert stepper.planner.stats.proposed_drafts > stepper.planner.stats.correct_drafts


def test_an_abort_while_drafts_are_in_flight_frees_pages_once() -> None:
    stepper = drafting()
    stepper.add(tokenized("a", LOOP, 100))
    verifying(stepper)
    while not (plan := stepper.planner.next(0.0)) or not plan.verifications:
        stepper.take(stepper.planner.apply(plan, stepper.worker.collect(stepper.worker.launch(plan)), 0.0))
    pending = stepper.worker.launch(plan)
    stepper.abort("a")
    made = stepper.output("a")
    stepper.take(stepper.planner.apply(plan, stepper.worker.collect(pending), 0.0))
    stepper.planner.check_invariants()
    assert stepper.planner.audit() == ""
    stepper.add(tokenized("b", LOOP + made, 20))
    stepper.run()
    assert stepper.output("b") == expected(LOOP + made, 20)


def test_a_retraction_while_drafts_are_in_flight_computes_the_same_tokens_again() -> None:
    stepper = drafting()
    stepper.add(tokenized("a", LOOP, 60))
    verifying(stepper)
    while not (plan := stepper.planner.next(0.0)) or not plan.verifications:
        stepper.take(stepper.planner.apply(plan, stepper.worker.collect(stepper.worker.launch(plan)), 0.0))
    pending = stepper.worker.launch(plan)
    stepper.planner.retract_all()
    stepper.take(stepper.planner.apply(plan, stepper.worker.collect(pending), 0.0))
    stepper.forget()
    stepper.run()
    assert stepper.output("a") == expected(LOOP, 60)


@pytest.mark.parametrize("page_size", [1, 4])
def test_drafts_take_no_page_that_somebody_needs(page_size: int) -> None:
    def retractions(drafts: DraftOptions | None) -> int:
        stepper = drafting(drafts=drafts, page_size=page_size, total_pages=160 // page_size, context_length=150)
        stepper.planner.growth.START = 0.0
        stepper.planner.growth.reset()
        for i in range(4):
            stepper.add(tokenized(f"r{i}", LOOP, 60, seed=i))
        stepper.run()
        assert [stepper.output(f"r{i}") for i in range(4)] == [expected(LOOP, 60, i) for i in range(4)]
        return stepper.planner.stats.retractions

    assert 0 < retractions(OPTIONS) <= retractions(None)


def test_a_draft_is_cut_to_the_pages_there_are() -> None:
    stepper = drafting(total_pages=len(LOOP) + 12, page_size=1)
    stepper.add(tokenized("a", LOOP, None))
    stepper.run()
    assert stepper.output("a") == expected(LOOP, 12)
    assert stepper.planner.stats.retractions == 0


def test_full_batches_share_the_drafts_of_a_step_and_fuller_ones_draft_nothing() -> None:
    for running in (4, 24, OPTIONS.max_step_tokens):
        stepper = drafting(total_pages=10_000, max_running=running, drafts=DraftOptions(64, 2, 8))
        for i in range(running):
            stepper.add(tokenized(f"r{i}", LOOP, 60, seed=i))
        stepper.run()
        most = max(plan.tokens for plan in stepper.worker.plans if not plan.prefills)
        assert running <= most <= OPTIONS.max_step_tokens
        assert (stepper.planner.stats.proposed_drafts > 0) == (running < OPTIONS.max_step_tokens)
        for i in range(running):
            assert stepper.output(f"r{i}") == expected(LOOP, 60, i)


def test_a_request_that_is_resumed_drafts_from_what_it_has() -> None:
    done = expected(LOOP, 30)
    stepper = drafting()
    stepper.add(tokenized("a", LOOP, 60, attempt=1, resume=done))
    stepper.run()
    assert done + stepper.output("a") == expected(LOOP, 60)
    assert stepper.planner.stats.correct_drafts > 0


def test_a_request_that_cannot_be_computed_ends_and_its_drafts_with_it() -> None:
    stepper = drafting()
    stepper.add(tokenized("a", LOOP, 60))
    verifying(stepper)
    stepper.worker.faults["a"] = "broken"
    stepper.run()
    assert stepper.finish("a").reason == "error"


def test_many_requests_give_the_same_tokens_as_each_by_itself_whatever_is_drafted() -> None:
    draw = random.Random(3)
    prompts = [[*LOOP[: draw.randrange(1, 14)], draw.randrange(2, 40)] for _ in range(30)]
    stepper = drafting(total_pages=300, max_running=12, chunked_prefill_size=16)
    for i, prompt in enumerate(prompts):
        stepper.add(tokenized(f"r{i}", prompt, 50, seed=i))
    stepper.run()
    assert [stepper.output(f"r{i}") for i in range(30)] == [expected(p, 50, i) for i, p in enumerate(prompts)]
    assert stepper.planner.stats.retractions > 0
    assert stepper.planner.stats.correct_drafts > 200


@pytest.mark.parametrize("resumed", [0, 7])
def test_a_grammar_gives_the_answer_without_drafts_in_fewer_steps_and_ends_at_the_same_token(resumed: int) -> None:
    def run(drafts: DraftOptions | None, resume: list[int]) -> Stepper:
        stepper = drafting(drafts=drafts)
        stepper.add(tokenized("a", LOOP, 100, resume=resume, attempt=bool(resume)), FakeGrammar(60))
        stepper.run()
        return stepper

    plain = run(None, [])
    whole = plain.output("a")
    drafted = run(OPTIONS, whole[:resumed])
    assert whole[:resumed] + drafted.output("a") == whole and len(whole) == 60
    assert drafted.finish("a") == plain.finish("a") == Finish(reason="stop", matched=whole[-1], spoken=True)
    assert drafted.steps < plain.steps - resumed
    assert drafted.planner.stats.correct_drafts > 15


def test_a_stop_id_before_the_token_that_completes_the_output_wins() -> None:
    stepper = drafting()
    stepper.add(tokenized("a", LOOP, 100, stop_token_ids=[4]), FakeGrammar(60))
    stepper.run()
    assert stepper.finish("a") == Finish(reason="stop", matched=4)
    assert len(stepper.output("a")) == 4
