"""Every Triton kernel, interpreted, against the torch operation of the same name."""

import pytest
import torch

from kernels.ops import resolve
from tests.kernels.cases import Case, assert_agree, case_id
from tests.kernels.table import SMALL

TORCH, TRITON = resolve("cpu", "torch"), resolve("cpu", "triton")


@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_kernel_agrees_with_torch(case: Case) -> None:
    assert_agree(case, TORCH, TRITON, torch.float32, "cpu", 1e-5)
