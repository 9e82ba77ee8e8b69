"""Gates of which only the largest count, as if all were distributed normally (Gemma 3n)."""

import torch

from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.activations import activations
from quartet.scheduler_service.model.layers import Mlp


def sparse(gate_up: torch.Tensor, block: Mlp, deterministic: bool) -> torch.Tensor:
    """activation(relu(gate - cutoff)) * up of the halves of gate_up (tokens, 2 * size): (tokens, size).

    The cutoff is so many standard deviations above the mean of a token's gates as belong to the share of zeros.
    """
    assert block.cutoff is not None
    gate, up = gate_up.chunk(2, dim=1)
    exact = gate.float()
    mean = exact.mean(-1, keepdim=True)
    variance = (exact - mean).square().mean(-1, keepdim=True)
    if block.ranks is not None:
        mean, variance = of_all_ranks(mean, variance, block.ranks)
    gate = torch.relu(exact - mean - variance.sqrt() * block.cutoff).to(up.dtype)
    return activations(deterministic)[block.activation](torch.cat((gate, up), dim=1))


def of_all_ranks(mean: torch.Tensor, variance: torch.Tensor, parallel: Parallel) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of all ranks' gates, from those of this rank's, of which each has as many: (tokens, 1) each."""
    found = mean.new_empty(len(mean), 2 * parallel.size)
    parallel.gather(torch.cat((mean, variance), 1), found)
    means, variances = found.view(-1, parallel.size, 2).unbind(2)  # (tokens, ranks) each
    whole = means.mean(1, keepdim=True)
    return whole, variances.mean(1, keepdim=True) + (means - whole).square().mean(1, keepdim=True)
