"""Figures of a model beside another one, from scores that are worked out by hand."""

import math

import pytest

from deploy.benchmarks import fidelity
from deploy.benchmarks.fidelity import Scores


def scores(*rows: dict[int, float]) -> Scores:
    """Positions whose token is 0, by the probabilities of the named ids."""
    tops = [{id: math.log(p) for id, p in row.items()} for row in rows]
    return Scores([top[0] for top in tops], tops)


def test_a_model_beside_itself_differs_in_nothing() -> None:
    same = scores({0: 0.5, 1: 0.3}, {0: 0.9, 2: 0.05})
    found = fidelity.divergence(same, same)
    assert (found.perplexity_ratio, found.kl_mean, found.kl_p99, found.same_best) == (1, 0, 0, 1)


def test_perplexity_is_the_inverse_of_the_geometric_mean_of_the_probabilities() -> None:
    assert scores({0: 0.5}, {0: 0.125}).perplexity == pytest.approx(4)


def test_the_divergence_of_two_coins_is_what_a_table_says() -> None:
    fair, bent = scores({0: 0.5, 1: 0.5}), scores({1: 0.75, 0: 0.25})
    found = fidelity.divergence(fair, bent)
    assert found.kl_mean == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert (found.perplexity_ratio, found.same_best) == (pytest.approx(2), 0)


def test_tokens_that_only_one_side_names_count_together() -> None:
    reference, served = scores({0: 0.5, 1: 0.3}), scores({0: 0.4, 2: 0.3})
    expected = 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)
    assert fidelity.divergence(reference, served).kl_mean == pytest.approx(expected)


def test_the_text_is_long_and_each_window_begins_with_the_token_that_is_asked_for() -> None:
    assert len(fidelity.text()) > 100_000
    found = fidelity.windows(list(range(2000)), 2, bos=7)
    assert [(len(window), window[0], window[1]) for window in found] == [(512, 7, 1), (512, 7, 513)]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(AssertionError, match="the text has 600 tokens, 2 windows need 1024"):
        fidelity.windows(list(range(600)), 2)
