"""Norms of whole rows by the compiled kernels."""

import pytest
import torch

from quartet.kernels.cpu.native import build, library
from quartet.kernels.cpu.norm import can_norm, normed
from quartet.kernels.reference import layers

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")


@pytest.mark.parametrize("shape", [(1, 896), (3, 70), (40, 1024)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_that_of_float64_rounded_once(shape, offset):
    kernels = library.library()
    assert kernels is not None
    x, weight = torch.randn(shape).bfloat16(), torch.randn(shape[1]).bfloat16()
    scale = (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
    expected = (x.double() * scale * (weight.double() + offset)).float()
    torch.testing.assert_close(normed(kernels, x, (weight, 1e-6, offset)).float(), expected, atol=1e-6, rtol=2**-8)
    function = layers.rms_norm_plus_one if offset else layers.rms_norm
    torch.testing.assert_close(normed(kernels, x, (weight, 1e-6, offset)), function(x, weight, 1e-6))


def test_it_takes_rows_of_bfloat16_that_lie_side_by_side():
    assert can_norm(torch.zeros(2, 8, dtype=torch.bfloat16)) and not can_norm(torch.zeros(2, 8))
    assert not can_norm(torch.zeros(2, 8, 4, dtype=torch.bfloat16))
    assert not can_norm(torch.zeros(8, 2, dtype=torch.bfloat16).T)
