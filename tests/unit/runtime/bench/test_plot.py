"""Pictures of runs."""

import pytest

from quartet.runtime.bench.plot import draw, throughput
from quartet.runtime.bench.records import Record
from quartet.runtime.errors import UsageError


def record(first: float, last: float, tokens: int) -> Record:
    return Record(0.0, first, last, last, [last - first], completion_tokens=tokens)


def test_tokens_are_spread_over_the_time_of_their_answer():
    middles, rates = throughput([record(0, 5, 50), record(5, 10, 10)], bins=10)
    assert middles == pytest.approx([0.5 + i for i in range(10)])
    assert rates == pytest.approx([10] * 5 + [2] * 5)


def test_no_token_is_lost_or_counted_twice():
    middles, rates = throughput([record(0.3, 7.7, 31), record(2.2, 2.2, 1)], bins=7)
    assert sum(rates) * middles[0] * 2 == pytest.approx(32)


def test_a_picture_is_a_png(tmp_path):
    draw({"http://a": [record(0.1, 1, 9)], "http://b": [record(0.2, 1, 9)]}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot write"):
        draw({"a": []}, tmp_path / "none" / "x.png")
