"""Every Triton kernel on a GPU against the torch operation of the same name, which computes in float32."""

import pytest
import torch

from kernels.ops import resolve
from tests.kernels.cases import Case, assert_agree, case_id
from tests.kernels.table import SERVED, SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand"),
]
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_kernel_agrees_with_torch(case: Case, dtype: torch.dtype) -> None:
    assert_agree(case, resolve("cuda", "torch"), resolve("cuda", "triton"), dtype, "cuda", TOLERANCES[dtype])


@pytest.mark.parametrize("case", SERVED, ids=case_id)
def test_kernel_agrees_at_served_shapes(case: Case) -> None:
    tolerance = TOLERANCES[torch.bfloat16]
    assert_agree(case, resolve("cuda", "torch"), resolve("cuda", "triton"), torch.bfloat16, "cuda", tolerance)
