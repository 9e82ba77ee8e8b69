"""Sums of several ranks."""

from pathlib import Path

import torch

from quartet.scheduler_service.host.parallel import Parallel
from tests.ranks import run_ranks

ROWS, COLUMNS = 37, 129


def sums(parallel: Parallel) -> list[torch.Tensor]:
    """The sum of random rows in order, all at once and each alone."""
    ordered = Parallel(parallel.rank, parallel.size, in_order=True)
    part = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(parallel.rank))
    return [ordered.sum(part), torch.cat([ordered.sum(row) for row in part.split(1)]), parallel.sum(part)]


def test_sums_in_order_have_the_same_bits_in_any_company(tmp_path: Path) -> None:
    found = run_ranks(3, tmp_path, sums)
    for together, alone, in_any_order in found:
        assert torch.equal(together, alone) and torch.equal(together, found[0][0])
        torch.testing.assert_close(together, in_any_order)
