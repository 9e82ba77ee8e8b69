"""Tables of figures."""

import pytest

from quartet.runtime.bench.records import Record
from quartet.runtime.bench.report import comparison, milliseconds, table
from quartet.runtime.bench.statistics import summarize


def records(ttft: float) -> list[Record]:
    return [Record(0.0, ttft, ttft + 1, ttft + 1, [0.5, 0.5], 100, 25, 3), Record(0.0, error="HTTP 503: full")]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0001234, "0.123"), (0.0012345, "1.23"), (0.0123, "12.3"), (12.3, "12300")]
)
def test_times_have_three_digits_that_count(seconds, shown):
    assert milliseconds(seconds) == shown


def test_a_table_has_all_figures():
    lines = table(summarize([records(0.5)], {"ttft": 0.6}))
    assert lines[0] == "1 of 2 requests completed in 1.50 s, 1.0 at once on average"
    assert lines[1] == "tokens: 100 in (25% cached), 3 out"
    assert lines[3] == "goodput: 0.67 requests/s (50% of all) with ttft ≤ 0.6 s"
    assert any(line.startswith("time to first token (TTFT)") and line.endswith("500") for line in lines)
    assert lines[-1] == "  1 × HTTP 503: full"


def test_an_interrupted_run_says_so_and_shows_what_there_is():
    assert table(summarize([[]], {}, interrupted=True))[0].endswith("interrupted")


def test_a_comparison_shows_the_seconds_figures_over_the_firsts():
    first, second = (summarize([records(ttft)], {}) for ttft in (0.5, 0.25))
    lines = comparison(first, second, ("http://a", "http://b"))
    assert lines[:2] == ["first:  http://a", "second: http://b"]
    assert next(line for line in lines if line.startswith("TTFT p50")).split() == [
        "TTFT",
        "p50,",
        "ms",
        "500",
        "250",
        "0.500",
    ]
