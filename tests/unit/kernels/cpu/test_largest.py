"""The largest number of each row is what torch finds."""

from math import inf, nan

import pytest
import torch

from quartet.kernels.cpu.largest import largest_of_rows
from quartet.kernels.cpu.native import build, library

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")


@pytest.fixture(autouse=True)
def kernels():
    if library.library() is None:
        pytest.skip("the kernels are switched off")


@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 1024), (5, 1025), (4, 151_936)])
def test_values_and_places_are_those_of_torch(shape):
    x = torch.randn(shape)
    values, places = largest_of_rows(x)
    assert torch.equal(values, x.max(1).values)
    assert torch.equal(places, x.max(1).indices)


def test_of_equal_numbers_the_first_counts_however_far_they_lie_apart():
    x = torch.zeros(3, 5000)
    x[0, 4999] = x[0, 17] = 2.0
    x[1, 3000] = x[1, 3001] = 2.0
    assert largest_of_rows(x)[1].tolist() == [17, 3000, 0]


@pytest.mark.parametrize("place", [0, 7, 1023, 1024, 2999])
def test_a_number_that_is_none_is_the_largest(place):
    x = torch.randn(2, 3000)
    x[0, 5], x[1, place] = inf, nan
    values, places = largest_of_rows(x)
    assert values[0] == inf and places[0] == 5
    assert values[1].isnan() and places[1] == place


def test_a_row_of_which_nothing_is_allowed_has_some_place():
    values, places = largest_of_rows(torch.full((2, 3000), -inf))
    assert values.tolist() == [-inf, -inf] and places.tolist() == [0, 0]


def test_rows_that_lie_apart_and_other_kinds_of_numbers_are_read_too():
    x = torch.randn(4, 300)
    assert torch.equal(largest_of_rows(x[::2, :200])[1], x[::2, :200].max(1).indices)
    assert torch.equal(largest_of_rows(x.double())[1], x.max(1).indices)
    assert largest_of_rows(torch.empty(0, 5))[1].shape == (0,)
