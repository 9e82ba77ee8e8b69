"""Figures from records whose times are known."""

import pytest

from quartet.runtime.bench.records import Record
from quartet.runtime.bench.statistics import distribution, is_good, percentile, ratios, summarize


def record(sent: float, ttft: float, tpot: float, tokens: int = 11, **more) -> Record:
    """A request whose tokens come one by one after the first."""
    last = sent + ttft + tpot * (tokens - 1)
    gaps = [tpot] * (tokens - 1)
    return Record(sent, sent + ttft, last, last, gaps, prompt_tokens=100, completion_tokens=tokens, **more)


def test_a_percentile_lies_between_two_values_linearly():
    values = [10.0, 20.0, 30.0, 40.0]
    assert [percentile(values, share) for share in (0, 0.5, 0.9, 1)] == pytest.approx([10, 25, 37, 40])
    assert percentile([7.0], 0.99) == 7


def test_a_distribution_of_nothing_is_none():
    assert distribution([]) is None


def test_times_of_a_request_follow_from_its_arrivals():
    one = record(5, ttft=0.25, tpot=0.5)
    assert (one.ttft, one.tpot, one.e2e) == (0.25, 0.5, 5.25)
    assert Record(1.0).ttft is None
    assert record(0, 0.1, 0.1, tokens=1).tpot is None


def test_rates_count_what_completed_over_the_time_from_first_request_to_last_end():
    failed = Record(0.0, error="HTTP 503: full")
    summary = summarize([[record(0, 1, 0.1), record(1, 1, 0.2), failed]], {})
    assert (summary.requests, summary.completed, summary.failed) == (3, 2, 1)
    assert summary.errors == {"HTTP 503: full": 1}
    assert summary.duration_s == pytest.approx(4)
    assert summary.requests_per_s == pytest.approx(0.5)
    assert summary.output_tokens_per_s == pytest.approx(22 / 4)
    assert summary.concurrency == pytest.approx((2 + 3) / 4)
    assert summary.ttft is not None and summary.ttft.mean == pytest.approx(1)


def test_goodput_counts_requests_that_keep_every_limit():
    slo = {"ttft": 0.5, "tpot": 0.05}
    records = [record(0, 0.4, 0.04), record(0, 0.6, 0.04), record(0, 0.4, 0.06), record(0, 0.5, 0.05, tokens=1)]
    assert [is_good(one, slo) for one in records] == [True, False, False, True]
    summary = summarize([records], slo)
    assert summary.good == 2
    assert summary.goodput_per_s == pytest.approx(2 / summary.duration_s)


def test_several_runs_are_measured_as_one_without_the_time_between_them():
    summary = summarize([[record(0, 1, 0.1)], [record(100, 1, 0.1)]], {})
    assert summary.duration_s == pytest.approx(4)
    assert summary.requests_per_s == pytest.approx(0.5)


def test_ratios_are_the_seconds_figures_over_the_firsts():
    first, second = (summarize([[record(0, ttft, 0.1)]], {}) for ttft in (1.0, 0.5))
    found = ratios(first, second)
    assert found["ttft_p50"] == pytest.approx(0.5)
    assert found["requests_per_s"] == pytest.approx(2 / 1.5)


def test_a_run_in_which_nothing_ended_has_no_figures_and_no_errors():
    summary = summarize([[]], {"ttft": 1.0}, interrupted=True)
    assert (summary.completed, summary.requests_per_s, summary.ttft) == (0, 0, None)
