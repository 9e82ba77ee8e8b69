"""Gates of which only the largest count, as if all were distributed normally (Gemma 3n)."""

import torch

from quartet.scheduler_service.model.activations import activations
from quartet.scheduler_service.model.layers import Mlp


def sparse(gate_up: torch.Tensor, block: Mlp, deterministic: bool) -> torch.Tensor:
    """activation(relu(gate - cutoff)) * up of the halves of gate_up (tokens, 2 * size): (tokens, size).

    The cutoff is so many standard deviations above the mean of a token's gates as belong to the share of zeros.
    """
    assert block.cutoff is not None
    gate, up = gate_up.chunk(2, dim=1)
    exact = gate.float()
    centred = exact - exact.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    gate = torch.relu(centred - deviation * block.cutoff).to(up.dtype)
    return activations(deterministic)[block.activation](torch.cat((gate, up), dim=1))
