"""From a request's parameters to the settings of its rows."""

from array import array

import pytest

from quartet.runtime.messages import Request
from quartet.runtime.sampling import GREEDY_BELOW, MOST_BIAS, SamplingParams
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.sampling.rows import Feature, sampling_rows
from quartet.scheduler_service.sampling.state import make_row, settings_of


@pytest.mark.parametrize("params", [{"temperature": 0.0, "top_p": 0.5, "min_p": 0.1}, {"top_k": 1, "top_p": 0.5}])
def test_a_greedy_request_uses_neither_temperature_nor_filters(params):
    settings = settings_of(SamplingParams(**params), seed=7)
    assert settings.plain and settings == (0, 0.0, 0, 1.0, 0.0, 7)


def test_a_filter_that_is_off_has_its_neutral_value():
    assert settings_of(SamplingParams(temperature=0.5), seed=0) == (Feature.DRAW, 0.5, 0, 1.0, 0.0, 0)
    filtered = settings_of(SamplingParams(top_k=4, top_p=0.9, min_p=0.2), seed=0)
    assert filtered == (Feature.DRAW | Feature.TOP_K | Feature.TOP_P | Feature.MIN_P, 1.0, 4, 0.9, 0.2, 0)
    assert not filtered.plain


@pytest.mark.parametrize("params", [{"presence_penalty": 1.0}, {"min_new_tokens": 3}, {"logit_bias": {"4": 1.0}}])
def test_what_changes_single_tokens_is_not_plain(params):
    assert not settings_of(SamplingParams(**params), seed=0).plain


def test_of_a_seed_the_lowest_64_bits_count():
    params = SamplingParams()
    assert settings_of(params, (1 << 64) - 1).seed == -1
    assert settings_of(params, 1 << 63).seed == -(1 << 63)


def test_rows_keep_the_order_of_their_requests():
    rows = sampling_rows([settings_of(SamplingParams(top_k=k), seed=k) for k in (2, -1, 5)], [10, 20, 30])
    assert (rows.seeds, rows.positions, rows.top_ks) == ([2, -1, 5], [10, 20, 30], [2, 0, 5])
    assert rows.using(Feature.TOP_K, [1, 2]) == [1] and rows.drawing() == [0, 1, 2]


def test_numbers_beyond_those_of_the_device_mean_the_largest_it_has():
    settings = settings_of(SamplingParams(temperature=1e300, top_k=1 << 63), seed=0)
    assert (settings.temperature, settings.top_k) == (1e38, 2**31 - 1)


def test_the_largest_bias_is_one_that_any_temperature_leaves_finite():
    params = SamplingParams(logit_bias={"3": -MOST_BIAS, "4": 2.5, "5": MOST_BIAS})
    row = make_row(Sequence(Request(rid="r", params=params), array("i", [1, 2]), 2), eos_ids=[0])
    assert row.bias_ids.tolist() == [3, 4, 5]
    assert row.biases.tolist() == pytest.approx([-1e30, 2.5, 1e30])
    assert abs(row.biases[0]) / GREEDY_BELOW < MOST_BIAS
