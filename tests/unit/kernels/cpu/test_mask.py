"""A bit mask leaves of each row what torch's own operations leave."""

from math import inf, nan

import numpy as np
import pytest
import torch

from quartet.kernels.cpu.mask import mask_rows
from quartet.kernels.cpu.native import build, library
from quartet.scheduler_service.sampling.choose import unpack_bits

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")


@pytest.fixture(autouse=True)
def kernels():
    if library.library() is None:
        pytest.skip("the kernels are switched off")


def random_mask(rows: int, n: int, whole_words: bool) -> torch.Tensor:
    """Bits of every kind of word: none, all and some set."""
    words = np.random.default_rng(n).integers(-(2**31), 2**31, (rows, -(-n // 32)), dtype=np.int64).astype(np.int32)
    if whole_words:
        words[:, ::3], words[:, 1::3] = 0, -1
    return torch.from_numpy(words)


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (3, 32), (2, 33), (5, 1000), (4, 151_936)])
def test_what_is_allowed_stays_and_the_rest_is_never_chosen(shape, whole_words):
    x, allowed = torch.randn(shape), random_mask(*shape, whole_words)
    expected = torch.where(unpack_bits(allowed, shape[1]), x, -inf)
    assert mask_rows(x, allowed)
    assert torch.equal(x, expected)


def test_bits_are_counted_from_the_lowest_of_each_word():
    x = torch.zeros(1, 40)
    assert mask_rows(x, torch.tensor([[1 << 31 | 1, 2]], dtype=torch.int64).to(torch.int32))
    assert x[0].isfinite().nonzero().flatten().tolist() == [0, 31, 33]


def test_what_is_no_number_goes_where_it_is_not_allowed_and_else_stays():
    x = torch.full((1, 64), nan)
    assert mask_rows(x, torch.tensor([[3, 0]], dtype=torch.int32))
    assert x[0, :2].isnan().all() and (x[0, 2:] == -inf).all()


def test_rows_that_lie_apart_are_masked_and_nothing_between_them():
    x, allowed = torch.randn(4, 100), random_mask(2, 70, False)
    before, expected = x.clone(), torch.where(unpack_bits(allowed, 70), x[::2, :70], -inf)
    assert mask_rows(x[::2, :70], allowed)
    assert torch.equal(x[::2, :70], expected)
    assert torch.equal(x[1::2], before[1::2]) and torch.equal(x[:, 70:], before[:, 70:])
    assert mask_rows(x[:0, :70], allowed[:0])


def test_what_the_kernel_cannot_read_is_left_to_others():
    x, allowed = torch.randn(2, 64), random_mask(2, 64, False)
    before = x.clone()
    for other in (x.double(), x.T.contiguous().T):
        assert not mask_rows(other, allowed)
        assert torch.equal(other, before.to(other.dtype))
