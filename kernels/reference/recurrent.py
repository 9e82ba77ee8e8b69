"""Recurrent operations in plain torch: tokens go in order through a state that is kept between steps.

Every sum is taken term by term in one order, so a token's bits depend neither on the sequences beside it nor on how a
prompt is cut.
"""

import torch

CHANNELS_CHUNK = 16  # tokens; where channels forget by themselves, a chunk takes the square of them for each channel


def causal_convolution(
    x: torch.Tensor, before: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's weighted sum over its last `taps` tokens: (y like x, float32; the state behind the last token).

    x (sequences, tokens, channels); `before` (sequences, taps - 1, channels): the inputs in front of it; weight
    (channels, taps), the last tap for the token itself; bias (channels,).
    """
    tokens, taps = x.shape[1], weight.shape[1]
    inputs = torch.cat((before, x), dim=1)
    values, weights = inputs.float(), weight.float()
    y = values[:, :tokens] * weights[:, 0]
    for tap in range(1, taps):
        y = y + values[:, tap : tap + tokens] * weights[:, tap]
    if bias is not None:
        y = y + bias.float()
    return y, inputs[:, tokens:]


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule, token by token, all float32: (y like value, the state behind the last token).

    The state forgets by exp(decay), then what it gives for a key moves by beta towards the value. Queries and keys
    (sequences, tokens, heads, key dim) are scaled to length one; value (sequences, tokens, heads, value dim); decay
    (sequences, tokens, heads, key dim), or 1 where all channels forget alike; beta (sequences, tokens, heads); state
    (sequences, heads, key dim, value dim).
    """
    query = unit_length(query) * query.shape[-1] ** -0.5
    key = unit_length(key)
    kept = decay.exp()
    y = torch.empty_like(value)
    for token in range(value.shape[1]):
        row = key[:, token].unsqueeze(-1)
        state = state * kept[:, token].unsqueeze(-1)
        change = (value[:, token] - (state * row).sum(dim=-2)) * beta[:, token].unsqueeze(-1)
        state = state + row * change.unsqueeze(-2)
        y[:, token] = (state * query[:, token].unsqueeze(-1)).sum(dim=-2)
    return y, state


def gated_delta_rule_by_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for long prompts, in matrix products over chunks of tokens; sums are taken in another order."""
    query = unit_length(query) * query.shape[-1] ** -0.5
    query, key, value = (x.transpose(1, 2) for x in (query, unit_length(key), value))  # (sequences, heads, tokens, dim)
    decay, beta = decay.transpose(1, 2), beta.transpose(1, 2).unsqueeze(-1)
    if decay.shape[-1] > 1:
        chunk = min(chunk, CHANNELS_CHUNK)
    parts = []
    for first in range(0, value.shape[2], chunk):
        q, k, v, b = (x[:, :, first : first + chunk] for x in (query, key, value, beta))
        sums = decay[:, :, first : first + chunk].cumsum(-2)
        grown = sums.exp()
        wanted = (v - (k * grown) @ state) * b
        change = torch.linalg.solve_triangular(kept_scores(k * b, k, sums), wanted, upper=False, unitriangular=True)
        parts.append((q * grown) @ state + kept_scores(q, k, sums) @ change)
        left = k * (sums[..., -1:, :] - sums).exp()
        state = state * grown[..., -1, :].unsqueeze(-1) + left.transpose(-1, -2) @ change
    return torch.cat(parts, dim=2).transpose(1, 2), state


def kept_scores(query: torch.Tensor, key: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Products of each query with the keys up to it, weighed by what is left of them: (…, tokens, tokens).

    Sums of decays (…, tokens, key dim), or 1 where all channels forget alike.
    """
    if sums.shape[-1] == 1:
        return query @ key.transpose(-1, -2) * kept_between(sums.squeeze(-1))
    kept = kept_between(sums.transpose(-1, -2)).movedim(-3, -1)  # (…, tokens, tokens, key dim)
    return (query.unsqueeze(-2) * key.unsqueeze(-3) * kept).sum(-1)


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """x over its length in the last dimension."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def state_space(
    value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, decay: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state space of Mamba-2, token by token, all float32: (y like value, the state behind the last token).

    The state forgets by exp(decay), then takes in key times value; a query reads it. Value (sequences, tokens, heads,
    value dim); keys and queries (sequences, tokens, heads, key dim); decay (sequences, tokens, heads); state
    (sequences, heads, key dim, value dim).
    """
    kept = decay.exp()
    y = torch.empty_like(value)
    for token in range(value.shape[1]):
        state = state * kept[:, token, :, None, None] + key[:, token].unsqueeze(-1) * value[:, token].unsqueeze(-2)
        y[:, token] = (state * query[:, token].unsqueeze(-1)).sum(dim=-2)
    return y, state


def state_space_by_chunks(
    value: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
    decay: torch.Tensor,
    state: torch.Tensor,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for long prompts, in matrix products over chunks of tokens; sums are taken in another order."""
    value, key, query = (x.transpose(1, 2) for x in (value, key, query))  # (sequences, heads, tokens, dim)
    decay = decay.transpose(1, 2)
    parts = []
    for first in range(0, value.shape[2], chunk):
        v, k, q = (x[:, :, first : first + chunk] for x in (value, key, query))
        sums = decay[:, :, first : first + chunk].cumsum(-1)
        parts.append((q @ k.transpose(-1, -2) * kept_between(sums)) @ v + (q * sums.exp().unsqueeze(-1)) @ state)
        left = k * (sums[..., -1:] - sums).exp().unsqueeze(-1)
        state = state * sums[..., -1].exp()[..., None, None] + left.transpose(-1, -2) @ v
    return torch.cat(parts, dim=2).transpose(1, 2), state


def kept_between(sums: torch.Tensor) -> torch.Tensor:
    """What is left at each token of each earlier one: sums of decays (…, tokens) → (…, tokens, tokens), 0 for later."""
    tokens = sums.shape[-1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=sums.device).triu(1)
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
