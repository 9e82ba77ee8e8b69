"""Texts of errors as they get into one line."""

import pytest

from quartet.runtime.shorten import reason


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("hidden_size"), "hidden_size is missing"),
        (KeyError("a\nb"), "a\\nb is missing"),
        (ValueError("two\n  lines"), "two lines"),
        (AssertionError(), "AssertionError"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_reason_is_one_line_that_says_more_than_a_key(error, said):
    assert reason(error) == said


def test_a_long_reason_is_cut():
    assert len(reason(ValueError("x" * 5000))) < 200
