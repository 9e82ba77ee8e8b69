"""Every Triton kernel on a GPU against the torch operation of the same name, which computes in float32."""

from dataclasses import replace

import pytest
import torch

from quartet.kernels.ops import resolve
from tests.kernels.cases import Case, assert_agree, case_id
from tests.kernels.table import SERVED, SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand"),
]
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEADS = [case for case in SMALL if case.op == "lm_head_sample"]


def agree(case: Case, dtype: torch.dtype, dependent: bool = False) -> None:
    if case.op == "lm_head_sample" and dtype is not torch.float32:
        # Logits that differ by a rounding may give another token; see the test of its draw below.
        case = replace(case, outputs=("logits", "counter"))
    triton = resolve("cuda", "triton", dependent)
    assert_agree(case, resolve("cuda", "torch"), triton, dtype, "cuda", TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_kernel_agrees_with_torch(case: Case, dtype: torch.dtype) -> None:
    agree(case, dtype)


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("case", SERVED, ids=case_id)
def test_kernel_agrees_at_served_shapes(case: Case, dependent: bool) -> None:
    agree(case, torch.bfloat16, dependent)


@pytest.mark.parametrize("case", HEADS, ids=case_id)
def test_head_draws_from_the_logits_that_it_leaves(case: Case) -> None:
    made = case.arguments(torch.bfloat16, "cuda")
    resolve("cuda", "triton").lm_head_sample(**made)
    tokens = made["tokens"].clone()
    draw = ("temperatures", "seeds", "positions", "slots", "tokens", "valid")
    resolve("cuda", "torch").draw(made["logits"], made["tops"], made["masses"], 64, *(made[name] for name in draw))
    assert torch.equal(made["tokens"], tokens)
