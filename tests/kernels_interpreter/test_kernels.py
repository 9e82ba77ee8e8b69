"""Every Triton kernel, interpreted, against the torch operation of the same name."""

import pytest
import torch

from quartet.kernels.ops import resolve
from tests.kernels import adapters, attention, dense, moe, recurrent
from tests.kernels.cases import Case, assert_agree, case_id
from tests.kernels.table import SMALL

TORCH, TRITON = resolve("cpu", "torch"), resolve("cpu", "triton")
STORED = [*dense.SMALL, *adapters.SMALL, *attention.SMALL, *moe.SMALL, *recurrent.SMALL]


@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_kernel_agrees_with_torch(case: Case) -> None:
    assert_agree(case, TORCH, TRITON, torch.float32, "cpu", 1e-5)


@pytest.mark.parametrize("case", STORED, ids=case_id)
def test_kernel_computes_in_float32_whatever_is_stored(case: Case) -> None:
    """The interpreter cuts a bfloat16 off where a GPU rounds it: a unit in the last place is no error."""
    assert_agree(case, TORCH, TRITON, torch.bfloat16, "cpu", 2**-6)
