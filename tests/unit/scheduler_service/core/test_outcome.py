from quartet.runtime.messages import unpack_ids
from quartet.scheduler_service.core import outcome, rules
from quartet.scheduler_service.core.plan import Result, Slice
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.stats import Stats
from tests.stepper import config, tokenized


def sequence(new_tokens: int = 8) -> Sequence:
    """One with five prompt tokens, all of them computed."""
    made = rules.sequence_of(tokenized("a", [1, 2, 3, 4, 5], new_tokens), config(), 0.0)
    made.prefill_end = made.computed = 5
    return made


def test_an_accepted_draft_is_appended_and_the_positions_of_wrong_ones_are_to_be_computed_again() -> None:
    its, stats = sequence(), Stats()
    its.computed = 9
    part, result = Slice(its, 5, 9, True, drafts=(6, 7, 8)), Result(tokens=[6, 7])
    assert outcome.accept_draft(part, result, stats) is None
    assert (list(its.ids[5:]), its.computed, result.tokens) == ([6, 7], 7, [6, 7])
    assert (stats.proposed_drafts, stats.correct_drafts) == (3, 1)


def test_tokens_after_the_one_that_ends_the_request_leave_the_result() -> None:
    its, stats = sequence(new_tokens=2), Stats()
    part, result = Slice(its, 5, 9, True, drafts=(6, 7, 8)), Result(tokens=[6, 7, 8, 9])
    finish = outcome.accept_draft(part, result, stats)
    assert finish is not None and finish.reason == "length"
    assert (list(its.ids[5:]), result.tokens, stats.correct_drafts) == ([6, 7], [6, 7], 1)


def test_only_the_first_update_of_a_request_is_its_first() -> None:
    its = sequence()
    updates = [outcome.update_of(its, Result(tokens=[token])) for token in (6, 7)]
    assert [(list(unpack_ids(update.ids)), update.first) for update in updates] == [([6], True), ([7], False)]
