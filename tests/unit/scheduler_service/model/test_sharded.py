"""A norm over what several ranks have a part of."""

from dataclasses import dataclass

import pytest
import torch

from quartet.kernels.reference.layers import rms_norm
from quartet.scheduler_service.model.sharded import norm_over_ranks

HEAD, TOKENS, EPSILON = 6, 5, 1e-5


@dataclass
class Together:
    """A rank that keeps what it sends, and gets what all of them send."""

    size: int
    sent: list[torch.Tensor]
    total: torch.Tensor

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        self.sent.append(part)
        return self.total


@pytest.mark.parametrize(("heads", "ranks"), [(4, 2), (4, 4), (2, 4), (1, 2)])
def test_heads_of_all_ranks_are_normed_together_whether_ranks_share_them_or_not(heads: int, ranks: int) -> None:
    x, weight = torch.randn(TOKENS, heads * HEAD), torch.randn(heads * HEAD)
    each = max(1, heads // ranks) * HEAD
    starts = [rank * (heads * HEAD // each) // ranks * each for rank in range(ranks)]
    total = torch.zeros(TOKENS, 1)
    for _ in range(2):  # the total is known once all have sent their sums
        sent: list[torch.Tensor] = []
        parts = [
            norm_over_ranks(x[:, at : at + each], weight[at : at + each], EPSILON, Together(ranks, sent, total))
            for at in starts
        ]
        total = torch.stack(sent).sum(0)
    expected = rms_norm(x, weight, EPSILON)
    for at, part in zip(starts, parts, strict=True):
        assert torch.allclose(part, expected[:, at : at + each], atol=1e-6)
