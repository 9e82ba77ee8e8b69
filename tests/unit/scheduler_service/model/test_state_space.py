"""Mamba-2's norm where several ranks have a part of one group each."""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from quartet.scheduler_service.host.parallel import ALONE
from quartet.scheduler_service.model.state_space import StateSpace, StateSpaceSpec

WIDTH, TOKENS = 24, 5
SPEC = StateSpaceSpec(taps=4, heads=8, head_dim=3, groups=2, state_dim=16, epsilon=1e-5)


@dataclass
class Recorded:
    """A rank that keeps what it sends, and gets what all of them send."""

    rank: int
    size: int
    sent: list[torch.Tensor]
    total: torch.Tensor

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        self.sent.append(part)
        return self.total


def mixer(**given: Any) -> StateSpace:
    return StateSpace(**{field.name: given.get(field.name) for field in fields(StateSpace)})


@pytest.mark.parametrize(("ranks", "groups"), [(4, 2), (4, 1), (2, 1)])
def test_ranks_that_share_a_group_norm_it_together(ranks: int, groups: int) -> None:
    y, norm = torch.randn(TOKENS, WIDTH), torch.randn(WIDTH)
    whole = mixer(shape=replace(SPEC, groups=groups), norm=norm, parallel=ALONE)
    own = replace(SPEC, heads=SPEC.heads // ranks, groups=1, norm_ranks=ranks // groups)
    total = torch.zeros(TOKENS, groups)
    for _ in range(2):  # the total is known once all have sent their sums
        sent: list[torch.Tensor] = []
        parts = []
        for rank in range(ranks):
            part = slice(rank * WIDTH // ranks, (rank + 1) * WIDTH // ranks)
            own_mixer = mixer(shape=own, norm=norm[part], parallel=Recorded(rank, ranks, sent, total))
            parts.append(own_mixer.normed(y[:, part]))
        total = torch.stack(sent).sum(0)
    assert torch.allclose(torch.cat(parts, 1), whole.normed(y), atol=1e-6)
