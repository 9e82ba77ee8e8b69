"""Gates by the compiled kernels are those of torch, whatever the size, on every instruction set."""

import pytest
import torch

from quartet.kernels.cpu.gating import gated
from quartet.kernels.cpu.native import build, library
from quartet.kernels.reference import layers as reference

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
PLAIN = {"silu": reference.silu_and_mul, "gelu_tanh": reference.gelu_tanh_and_mul}


@pytest.fixture(params=library.INSTRUCTION_SETS)
def kernels(request):
    try:
        return library.Library(library.functions(request.param), request.param)
    except LookupError:
        pytest.skip(f"this machine has no {request.param}")


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("shape", [(1, 16), (3, 7), (5, 48), (300, 96)])
def test_a_factor_is_scaled_by_its_gate(kernels, activation, shape):
    torch.manual_seed(0)
    gate, factor = (torch.randn(shape).bfloat16() for _ in range(2))
    found = gated(kernels, gate, factor, activation)
    expected = PLAIN[activation](torch.cat((gate, factor), dim=1))
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-3, rtol=2**-6)


def test_a_row_has_the_same_bits_alone_and_among_others(kernels):
    torch.manual_seed(0)
    gate, factor = (torch.randn(40, 90).bfloat16() for _ in range(2))
    together = gated(kernels, gate, factor, "gelu_tanh")
    assert torch.equal(together[7:8], gated(kernels, gate[7:8].clone(), factor[7:8].clone(), "gelu_tanh"))
