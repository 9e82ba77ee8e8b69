from array import array

import pytest

from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.drafts import FIRST_LENGTH, MAX_SKIPPED, Drafter, DraftOptions, drafter_of

OPTIONS = DraftOptions(max_tokens=8, min_match=2, max_match=8)
LOOP = array("i", [1, 2, 3] * 4)


def test_drafts_grow_while_they_are_right_and_shrink_while_they_are_wrong():
    drafter = Drafter(OPTIONS)
    lengths = []
    for right in (True, True, True, False, False, True):
        lengths.append(len(drafter.propose(LOOP, 64)))
        drafter.learn(lengths[-1], lengths[-1] if right else 0)
    assert lengths == [FIRST_LENGTH, 4, 8, 8, 4, 2]


def test_after_a_draft_that_was_right_in_part_the_next_is_at_least_that_long():
    drafter = Drafter(OPTIONS)
    for correct in (2, 4, 7):
        drafter.learn(len(drafter.propose(LOOP, 64)), correct)
    assert len(drafter.propose(LOOP, 64)) == 7


def test_text_whose_drafts_always_fail_is_rarely_drafted():
    drafter = Drafter(OPTIONS)
    drafted = 0
    for _ in range(1000):
        if draft := drafter.propose(LOOP, 64):
            drafter.learn(len(draft), 0)
            drafted += len(draft)
    assert 1000 // (MAX_SKIPPED + 1) <= drafted < 1000 // MAX_SKIPPED + 10


def test_one_right_draft_ends_the_long_pauses_between_drafts():
    drafter = Drafter(OPTIONS)
    for _ in range(100):
        if draft := drafter.propose(LOOP, 64):
            drafter.learn(len(draft), 0)
    drafter.learn(1, 1)
    drafter.learn(2, 0)
    drafter.learn(1, 0)
    chances = [bool(drafter.propose(LOOP, 64)) for _ in range(3)]
    assert sum(chances) >= 1


class Allowing:
    """A grammar and its guide: it allows some tokens, forces others, and counts what it was told."""

    def __init__(self, allowed, forced=()):
        self.tokens, self._allowed, self._forced = [], allowed, forced

    def guide(self):
        return self

    def take(self, tokens):
        self.tokens += tokens

    def allowed(self, draft):
        return next((i for i, token in enumerate(draft) if token not in self._allowed), len(draft))

    def forced(self):
        return self._forced


def test_a_draft_is_cut_at_the_first_token_that_the_grammar_refuses():
    drafter = Drafter(OPTIONS, Allowing({1, 2}))
    for _ in range(3):
        drafter.learn(8, 8)
    assert drafter.propose(LOOP, 64) == (1, 2)
    assert Drafter(OPTIONS, Allowing({2})).propose(LOOP, 64) == ()


def test_what_the_grammar_forces_is_drafted_where_it_is_longer():
    assert Drafter(OPTIONS, Allowing({1, 2, 3}, (1, 2, 9))).propose(LOOP, 64) == (1, 2, 9)
    assert Drafter(OPTIONS, Allowing({1, 2, 3}, (1, 2, 9))).propose(LOOP, 2) == (1, 2)
    assert Drafter(OPTIONS, Allowing({1, 2, 3}, (1,))).propose(LOOP, 64) == (1, 2)
    assert Drafter(OPTIONS, Allowing(set(), range(20))).propose(LOOP, 64) == range(8)


def test_forced_drafts_that_fail_do_not_shorten_the_others():
    grammar = Allowing({1, 2, 3}, (1, 2, 9))
    drafter = Drafter(OPTIONS, grammar)
    for _ in range(4):
        drafter.learn(len(drafter.propose(LOOP, 64)), 0)
    grammar._forced = ()
    assert len(drafter.propose(LOOP, 64)) >= 1
    drafter.learn(2, 2)
    assert len(drafter.propose(LOOP, 64)) == 4


def test_a_guide_is_told_the_output_and_each_of_its_tokens_once():
    grammar = Allowing(set())
    drafter = Drafter(OPTIONS, grammar, prompt_len=10)
    for length in (10, 11, 12):
        drafter.propose(LOOP[:length], 64)
    assert grammar.tokens == list(LOOP[10:])


def test_no_draft_is_longer_than_asked():
    drafter = Drafter(OPTIONS)
    assert len(drafter.propose(LOOP, 1)) == 1
    assert drafter.propose(LOOP, 0) == ()


@pytest.mark.parametrize(
    ("params", "request_", "drafted"),
    [
        ({}, {}, True),
        ({"temperature": 0.8, "top_p": 0.5, "min_new_tokens": 9, "logit_bias": {"5": 1.0}}, {}, True),
        ({"frequency_penalty": 0.5}, {}, False),
        ({"presence_penalty": -0.5}, {}, False),
        ({"repetition_penalty": 1.1}, {}, False),
        ({"regex": "a+"}, {}, True),
        ({}, {"return_hidden_states": True}, False),
        ({}, {"return_routed_experts": True}, False),
        ({}, {"task": "embed"}, False),
    ],
)
def test_only_requests_whose_tokens_can_be_verified_together_are_drafted(params, request_, drafted):
    request = Request(rid="r", params=SamplingParams(**params), **request_)
    assert (drafter_of(request, OPTIONS) is not None) == drafted
    assert drafter_of(request, None) is None
