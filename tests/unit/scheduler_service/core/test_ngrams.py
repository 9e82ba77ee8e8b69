"""What followed the last tokens earlier: the index against a search through the whole sequence."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartet.scheduler_service.core import ngrams
from quartet.scheduler_service.core.ngrams import NGrams

TEXTS = st.lists(st.integers(0, 4), max_size=120)
WINDOWS = st.tuples(st.integers(1, 5), st.integers(0, 6)).map(lambda sizes: (sizes[0], sum(sizes)))


def searched(ids: list[int], shortest: int, longest: int, count: int) -> tuple[int, ...]:
    """The continuation by its definition."""

    def common(place: int) -> int:
        return next((n for n in range(min(longest, place + 1), 0, -1) if ids[place + 1 - n : place + 1] == ids[-n:]), 0)

    found = [place for place in range(len(ids) - 2, -1, -1) if common(place) >= shortest][: ngrams.MAX_COMPARED]
    if not found:
        return ()
    text, place = list(ids), max(found, key=lambda place: (common(place), place))
    for follower in range(place + 1, place + 1 + count):
        text.append(text[follower])  # which may be one that was appended here
    return tuple(text[len(ids) :])


def entered(ids: list[int], shortest: int, longest: int) -> NGrams:
    index = NGrams(shortest, longest)
    while not index.follow(array("i", ids)):
        pass
    return index


@given(ids=TEXTS, window=WINDOWS, count=st.integers(0, 20))
def test_the_continuation_is_that_of_the_longest_and_latest_earlier_run(ids, window, count):
    index = entered(ids, *window)
    assert index.continuation(array("i", ids), count) == searched(ids, *window, count)


@given(ids=TEXTS, window=WINDOWS, ends=st.lists(st.integers(0, 120), max_size=5))
def test_a_sequence_that_grows_gives_what_it_gives_at_once(ids, window, ends):
    index, growing = NGrams(*window), array("i")
    for end in sorted(ends):
        growing.extend(ids[len(growing) : end])
        assert index.follow(growing)
    growing.extend(ids[len(growing) :])
    assert index.follow(growing)
    assert index.continuation(growing, 8) == entered(ids, *window).continuation(array("i", ids), 8)


def test_a_long_prompt_is_entered_over_several_calls():
    ids = array("i", range(2 * ngrams.MAX_ENTERED + 2))
    index = NGrams(2, 8)
    assert [index.follow(ids) for _ in range(3)] == [False, False, True]


def test_periodic_text_is_continued_beyond_its_end():
    assert entered([1, 2, 3] * 3, 2, 8).continuation(array("i", [1, 2, 3] * 3), 7) == (1, 2, 3, 1, 2, 3, 1)


def test_the_longest_run_wins_over_a_later_one():
    ids = [1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3]
    assert entered(ids, 2, 8).continuation(array("i", ids), 1) == (50,)
    assert entered(ids, 2, 2).continuation(array("i", ids), 1) == (60,)


@pytest.mark.parametrize("ids", [[], [1], [1, 2, 3, 4]])
def test_text_that_does_not_repeat_has_no_continuation(ids):
    assert entered(ids, 2, 8).continuation(array("i", ids), 4) == ()
