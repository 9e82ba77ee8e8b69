"""When the budget of a thought is spent, and which draws surely come before that."""

from array import array

import pytest

from quartet.runtime.messages import Place, Request, Thought, ThoughtIds
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.thought_budget import ThoughtBudget, thought_budget_of

OPEN, CLOSE, BLANK, WORD = 1, 2, 3, 9
PROMPT = 4


def budget(tokens: int, output: list[int], place: Place = "inside") -> ThoughtBudget:
    thought = Thought(
        opening="<think>",
        closing="</think>",
        place=place,
        ids=ThoughtIds(opening=OPEN, closing=CLOSE, blanks=[BLANK]),
    )
    request = Request(rid="r", params=SamplingParams(thinking_budget=tokens), thought=thought)
    found = thought_budget_of(request, PROMPT)
    assert found is not None
    found.follow(array("i", [7] * PROMPT + output))
    return found


def forced(tokens: int, output: list[int], place: Place = "inside") -> bool:
    return budget(tokens, output, place).forced_at(PROMPT + len(output)) == CLOSE


@pytest.mark.parametrize(
    ("tokens", "output", "place", "due"),
    [
        (0, [], "inside", True),
        (2, [WORD], "inside", False),
        (2, [WORD, WORD], "inside", True),
        (2, [WORD, BLANK], "inside", True),  # in the thought, a blank is a token like others
        (2, [WORD, WORD, CLOSE], "inside", False),
        (2, [CLOSE, WORD, WORD, WORD], "inside", False),
        (0, [], "before", False),
        (0, [OPEN], "before", True),
        (0, [BLANK, OPEN], "before", True),
        (1, [BLANK, OPEN, WORD], "before", True),
        (1, [OPEN], "before", False),
        (0, [WORD, OPEN, WORD], "before", False),  # the answer has begun
    ],
)
def test_the_closing_tag_is_forced_behind_as_many_tokens_as_the_budget_has(
    tokens: int, output: list[int], place: Place, due: bool
) -> None:
    assert forced(tokens, output, place) is due


def test_nothing_is_forced_at_a_later_position() -> None:
    assert budget(0, []).forced_at(PROMPT + 1) is None


@pytest.mark.parametrize("place", ["inside", "before"])
@pytest.mark.parametrize("tokens", range(4))
def test_no_token_is_forced_among_those_that_are_free(tokens: int, place: Place) -> None:
    start = budget(tokens, [], place)
    output: list[int] = []
    for token in [OPEN, *[WORD] * tokens] if place == "before" else [WORD] * tokens:
        assert not forced(tokens, output, place)
        output.append(token)
    assert forced(tokens, output, place) and start.free == len(output)


def test_a_budget_that_is_counted_token_by_token_equals_one_that_follows_the_ids() -> None:
    output = [BLANK, OPEN, WORD, WORD]
    grown = budget(3, [], "before")
    for token in output:
        grown.take(token)
    whole = budget(3, output, "before")
    assert grown.free == whole.free == 1


@pytest.mark.parametrize(
    ("params", "thought"),
    [
        (SamplingParams(), Thought(opening="a", closing="b", ids=ThoughtIds(opening=1, closing=2))),
        (SamplingParams(thinking_budget=1), None),
        (SamplingParams(thinking_budget=1), Thought(opening="a", closing="b")),
        (
            SamplingParams(thinking_budget=1),
            Thought(opening="a", closing="b", place="past", ids=ThoughtIds(opening=1, closing=2)),
        ),
    ],
)
def test_without_a_budget_or_a_thought_nothing_is_counted(params: SamplingParams, thought: Thought | None) -> None:
    assert thought_budget_of(Request(rid="r", params=params, thought=thought), PROMPT) is None
