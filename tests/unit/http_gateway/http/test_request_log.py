"""The text of a line of the request log."""

import pytest

from quartet.http_gateway.http.request_log import plain_value


@pytest.mark.parametrize(
    ("value", "shown"),
    [(7, "7"), (0.25, "0.25"), ("/generate", "/generate"), ("a b=c\n", '"a b=c\\n"'), ("", '""'), (["a"], '["a"]')],
)
def test_a_value_is_one_word_of_the_line(value: object, shown: str) -> None:
    assert plain_value(value) == shown
