"""Products, norms, rotation and attention in plain torch; the signatures are in kernels/operations.py."""

import torch
import torch.nn.functional as F

from quartet.kernels.reference import layers

ACTIVATIONS = {
    "silu": layers.silu_and_mul,
    "gelu": layers.gelu_and_mul,
    "gelu_tanh": layers.gelu_tanh_and_mul,
}


def normed(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, plus_one: bool) -> torch.Tensor:
    """x in float32, normed if there is a weight."""
    if weight is None:
        return x.float()
    return F.rms_norm(x.float(), weight.shape, weight.float() + float(plus_one), epsilon)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, plus_one: bool, out: torch.Tensor) -> None:
    """See kernels.operations.Ops.rms_norm."""
    out.copy_(normed(x, weight, epsilon, plus_one))


def gated_activation(gate_up: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """See kernels.operations.Ops.gated_activation."""
    out.copy_(ACTIVATIONS[activation](gate_up.float()))


def gemv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, out: torch.Tensor
) -> None:
    """See kernels.operations.Ops.gemv."""
    y = linear(x, weight, bias)
    out.copy_(y if residual is None else y + residual.float())


def norm_gate_up(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.norm_gate_up."""
    out.copy_(ACTIVATIONS[activation](linear(normed(x, norm_weight, epsilon, plus_one), weight, bias)))


def paged_decode(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    table_rows: torch.Tensor | None,
    lengths: torch.Tensor,
    page_size: int,
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    partials: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.paged_decode."""
    for row, length in enumerate(lengths.tolist()):
        if not length:
            out[row].zero_()
            continue
        k, v = context(k_pool, v_pool, page_table, table_rows, row, length, page_size)
        out[row] = layers.attention(q[row : row + 1], k, v, scale, window, softcap, sinks)[0]


def paged_extend(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    table_rows: torch.Tensor | None,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    most_queries: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal: bool,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.paged_extend."""
    bounds = starts.tolist()
    for row, length in enumerate(lengths.tolist()):
        first, last = bounds[row], bounds[row + 1]
        if not length:
            out[first:last] = 0
            continue
        k, v = context(k_pool, v_pool, page_table, table_rows, row, length, page_size)
        if causal:
            out[first:last] = layers.attention(q[first:last], k, v, scale, window, softcap, sinks)
            continue
        for token in range(first, last):  # a single query is the last position and so sees every key
            out[token] = layers.attention(q[token : token + 1], k, v, scale, None, softcap, sinks)[0]


def context(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    table_rows: torch.Tensor | None,
    row: int,
    length: int,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence, each (length, kv_heads, dim)."""
    pages = page_table[row if table_rows is None else int(table_rows[row])].long()
    positions = torch.arange(length, device=k_pool.device)
    slots = pages[positions // page_size] * page_size + positions % page_size
    return k_pool[:, slots].transpose(0, 1), v_pool[:, slots].transpose(0, 1)


def norm_qkv_rope_kv(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    q: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.norm_qkv_rope_kv."""
    qkv = linear(normed(x, norm_weight, epsilon, plus_one), weight, bias)
    rope_kv(qkv, None, None, epsilon, plus_one, cos, sin, slots, k_pool, v_pool, q)


def rope_kv(
    qkv: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    q: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.rope_kv."""
    heads, kv_heads = q.shape[1], len(k_pool)
    parts = qkv.float().view(len(q), -1, q.shape[2]).split((heads, kv_heads, kv_heads), dim=1)
    query, key = (
        layers.rotate(normed(part, weight, epsilon, plus_one), cos.float(), sin.float())
        for part, weight in zip(parts, (query_norm, key_norm), strict=False)
    )
    q.copy_(query)
    for pool, part in ((k_pool, key), (v_pool, parts[2])):
        pool[:, slots.long()] = part.transpose(0, 1).to(pool.dtype)


def skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partials: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    block: int | None = None,
) -> None:
    """See kernels.operations.Ops.skinny."""
    gemv(x, weight, bias, residual, out)


def skinny_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    partials: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    block: int | None = None,
) -> None:
    """See kernels.operations.Ops.skinny_gated."""
    norm_gate_up(x, None, 0.0, False, weight, bias, activation, out)
