"""The operations of recurrent layers in decode steps in plain torch, with the signatures of the Triton kernels."""

import torch

from quartet.kernels.reference.recurrent import causal_convolution, gated_delta_rule, state_space


def convolve_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activates: bool,
    reads: torch.Tensor,
    writes: torch.Tensor,
    states: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See kernels.recurrent_operations.RecurrentOps.convolve_row."""
    y, behind = causal_convolution(x.unsqueeze(1), states[reads], weight, bias)
    y = y.squeeze(1).to(x.dtype)
    if activates:
        y = y.float() * (-y.float()).exp_().add_(1.0).reciprocal_()
    out.copy_(y)
    states[writes] = behind


def delta_update(
    mixed: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    reads: torch.Tensor,
    writes: torch.Tensor,
    states: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See kernels.recurrent_operations.RecurrentOps.delta_update."""
    heads, key_dim, value_dim = states.shape[1:]
    keys = (mixed.shape[1] - heads * value_dim) // 2
    query, key, value = mixed.float().split((keys, keys, heads * value_dim), dim=1)
    query, key = (by_head(x, heads, key_dim) for x in (query, key))
    rates = decay.view(len(mixed), 1, heads, -1), beta.unsqueeze(1)
    y, behind = gated_delta_rule(query, key, value.view(len(mixed), 1, heads, value_dim), *rates, states[reads])
    out.copy_(y.flatten(1))
    states[writes] = behind


def space_update(
    mixed: torch.Tensor,
    decay: torch.Tensor,
    steps: torch.Tensor,
    skip: torch.Tensor,
    reads: torch.Tensor,
    writes: torch.Tensor,
    states: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See kernels.recurrent_operations.RecurrentOps.space_update."""
    heads, key_dim, value_dim = states.shape[1:]
    keys = (mixed.shape[1] - heads * value_dim) // 2
    value, key, query = mixed.float().split((heads * value_dim, keys, keys), dim=1)
    key, query = (by_head(x, heads, key_dim) for x in (key, query))
    value = value.view(len(mixed), 1, heads, value_dim)
    y, behind = state_space(value * steps.view(len(mixed), 1, heads, 1), key, query, decay.unsqueeze(1), states[reads])
    out.copy_((y + value * skip.float().unsqueeze(-1)).flatten(1))
    states[writes] = behind


def by_head(x: torch.Tensor, heads: int, key_dim: int) -> torch.Tensor:
    """Keys or queries (rows, key heads * key dim) as each head has them: (rows, 1 token, heads, key dim)."""
    own = x.view(len(x), 1, -1, key_dim)
    return own.repeat_interleave(heads // own.shape[2], dim=2)
