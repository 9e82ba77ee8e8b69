"""The decoder's small operations in plain torch: the specification that faster kernels must agree with."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

GatedActivation = Callable[[torch.Tensor], torch.Tensor]
Project = Callable[[torch.Tensor], torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def rms_norm_plus_one(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / rms(x) * (1 + weight), rounded once at the end: weights are stored as their distance from one."""
    return F.rms_norm(x.float(), weight.shape, weight.float() + 1.0, epsilon).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(x - mean(x)) / deviation(x) * weight over the last dimension, rounded once at the end."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), None, epsilon).to(x.dtype)


def rotation(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of every token's angles, each (tokens, 1, rotary_dim).

    The first half of the sines is negated, so that `rotate` needs no negation of its own.
    """
    angles = positions.float().unsqueeze(1) * frequencies  # (tokens, rotary_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    cos = torch.cat((cos, cos), dim=-1)
    sin = torch.cat((-sin, sin), dim=-1)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (tokens, heads, dim): pairs (i, i + rotary_dim / 2) turn, what lies beyond stays."""
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        turned, rest = x.split((rotary_dim, x.shape[-1] - rotary_dim), dim=-1)
        return torch.cat((rotate(turned, cos, sin), rest), dim=-1)
    swapped = x.roll(rotary_dim // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(first half) * second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(first half) * second half, with the tanh approximation of gelu."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def clamped_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate * sigmoid(1.702 * gate) * (up + 1) of the halves of the last dimension: gate at most 7, up within ±7."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(gate * 1.702) * (up + 1)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """The square of what is above zero; it has no gate."""
    return torch.relu(x).square()


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap)."""
    return torch.tanh(x / cap) * cap


def choose_experts(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (float32) and ids of each token's experts, both (tokens, top_k), best first."""
    weights, ids = router_logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids


def choose_scored_experts(
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    renormalize: bool,
    groups: int = 1,
    top_groups: int = 1,
    group_best: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of each token's experts by scores (tokens, experts) float32; both (tokens, top_k), best first.

    The choice is by score + bias, the weight is the score. Of `groups` of neighbouring experts only those `top_groups`
    can be chosen from whose `group_best` best experts have the largest sum.
    """
    wanted = scores if bias is None else scores + bias
    if groups > 1:
        grouped = wanted.unflatten(1, (groups, -1))
        best = grouped.topk(group_best, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        refused = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        wanted = grouped.masked_fill(refused.unsqueeze(-1), -torch.inf).flatten(1)
    ids = wanted.topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights, ids


def run_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: Sequence[Project],
    down: Sequence[Project],
    activation: GatedActivation,
    on_rows: Callable[[torch.Tensor | None], None] | None = None,
    scale_inputs: bool = False,
) -> torch.Tensor:
    """The weighted sum of each token's experts: x (tokens, hidden) → (tokens, hidden).

    Tokens are grouped by expert, so that each expert that was chosen reads its weights once. A token's experts are
    summed in the order of `ids`: the result does not depend on the rest of the batch.
    `on_rows` hears before each expert which tokens it computes, and None at the end.
    With `scale_inputs` the weights are for what experts read.
    """
    tokens, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    grouped = x[order // top_k]  # (tokens * top_k, hidden), by expert
    if scale_inputs:
        grouped = grouped * weights.flatten()[order].to(x.dtype).unsqueeze(1)
    counts = ids.flatten().bincount(minlength=len(down)).tolist()
    outputs = torch.empty_like(grouped)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            if on_rows is not None:
                on_rows(order[start : start + count] // top_k)
            rows = activation(gate_up[expert](grouped[start : start + count]))
            outputs[order[start : start + count]] = down[expert](rows)
            start += count
    if on_rows is not None:
        on_rows(None)
    weighted = outputs.view(tokens, top_k, -1)
    if not scale_inputs:
        weighted = weighted * weights.to(x.dtype).unsqueeze(-1)
    return weighted.sum(dim=1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence whose last positions are the queries: q (queries, heads, dim), k and v
    (keys, kv_heads, dim) → (queries, heads, dim), computed in float32."""
    queries, heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    grouped = q.float().view(queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("qngd,knd->ngqk", grouped, k.float()) * scale
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    query_at = torch.arange(keys - queries, keys, device=q.device).unsqueeze(1)
    key_at = torch.arange(keys, device=q.device)
    hidden = key_at > query_at
    if window is not None:
        hidden |= key_at <= query_at - window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:  # one more column that takes its share and gives nothing
        column = sinks.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    shares = scores.softmax(dim=-1)[..., :keys]
    return torch.einsum("ngqk,knd->qngd", shares, v.float()).reshape(queries, heads, dim).to(q.dtype)
