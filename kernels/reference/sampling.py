"""From hidden states to tokens in plain torch, one operation for each Triton kernel of the same name and signature."""

from math import inf

import torch

from quartet.kernels.reference import layers
from quartet.kernels.reference.dense import linear, normed
from quartet.kernels.reference.philox import uniform


def lm_head_sample(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    weight: torch.Tensor,
    softcap: float | None,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor | None,
    logits: torch.Tensor,
    tops: torch.Tensor,
    masses: torch.Tensor,
    counter: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.lm_head_sample."""
    made = linear(normed(x, norm_weight, epsilon, plus_one).to(x.dtype), weight)
    logits.copy_(made if softcap is None else layers.soft_cap(made, softcap))
    process_logits(logits, None, temperatures, tops, masses)
    draw(
        logits, tops, masses, -(-logits.shape[1] // tops.shape[1]), temperatures, seeds, positions, slots, tokens, valid
    )


def process_logits(
    logits: torch.Tensor,
    allowed: torch.Tensor | None,
    temperatures: torch.Tensor,
    tops: torch.Tensor,
    masses: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.process_logits."""
    if allowed is not None:
        bits = torch.arange(32, dtype=torch.int32, device=allowed.device)
        is_allowed = ((allowed.unsqueeze(2) >> bits) & 1).bool().flatten(1)[:, : logits.shape[1]]
        logits.masked_fill_(~is_allowed, -inf)
    logits /= torch.where(temperatures == 0, 1.0, temperatures).unsqueeze(1)


def draw(
    logits: torch.Tensor,
    tops: torch.Tensor,
    masses: torch.Tensor,
    block: int,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor | None,
    tokens: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.draw."""
    off = torch.zeros_like(temperatures)
    chosen = choose(logits, temperatures, off.int(), off + 1, off, seeds, positions, valid).to(tokens.dtype)
    if slots is None:
        tokens.copy_(chosen)
    else:
        tokens[slots[slots >= 0].long()] = chosen[slots >= 0]


def select(
    logits: torch.Tensor,
    tops: torch.Tensor,
    masses: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    candidates: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.select."""
    tokens.copy_(choose(logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, valid))


def choose(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """A token for each row of logits, int64 (rows,); writes `valid`. The arguments are those of `select`."""
    best, largest = logits.max(1)
    valid.copy_(torch.isfinite(best))
    weights = (logits - best.unsqueeze(1)).exp().double()
    floors = torch.maximum(min_ps.double(), torch.maximum(top_k_floor(weights, top_ks), top_p_floor(weights, top_ps)))
    weights = torch.where(weights >= floors.unsqueeze(1), weights, 0.0)
    cumulative = weights.cumsum(1)
    target = uniform(seeds, positions).unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return torch.where(temperatures == 0, largest, drawn)


def top_k_floor(weights: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """The k-th largest weight of each row, 0 where the filter is off."""
    on = (top_ks > 0) & (top_ks < weights.shape[1])
    places = torch.where(on, top_ks - 1, 0).long().unsqueeze(1)
    return torch.where(on, weights.sort(1, descending=True).values.gather(1, places).squeeze(1), 0.0)


def top_p_floor(weights: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """The smallest weight of the shortest list of best tokens whose share reaches p, 0 where the filter is off."""
    values = weights.sort(1, descending=True).values
    mass = values.cumsum(1)
    places = torch.searchsorted(mass, top_ps.double().unsqueeze(1) * mass[:, -1:]).clamp_(max=weights.shape[1] - 1)
    return torch.where(top_ps < 1, values.gather(1, places).squeeze(1), 0.0)
