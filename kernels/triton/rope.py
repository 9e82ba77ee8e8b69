"""From hidden states, or from their products, to rotated queries, and to keys and values in the pool.

Cosines and sines come as `reference.rotation` makes them: (tokens, 1, rotary_dim), the first half of the sines negated.
"""

import torch
import triton.language as tl

from quartet.kernels.triton.common import (
    blocks,
    column_block,
    head_stride,
    options,
    power_of_two,
    row_product_pairs,
    scale_of_norm,
    start_next_kernel,
)
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import FEW_ROWS, tile


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
    *,
    dependent: bool = False,
) -> None:
    """See kernels.operations.Ops.norm_qkv_rope_kv."""
    chosen = tile("qkv_rope_kv")
    tokens, columns = x.shape
    _, heads, dim = q.shape
    assert tokens <= FEW_ROWS, tokens
    assert cos.shape[-1] == dim, (cos.shape, dim)
    half = dim // 2
    pairs = min(chosen.rows, power_of_two(half))
    _norm_qkv_rope_kv[(heads + 2 * len(k_pool), blocks(half, pairs))](
        x,
        norm_weight,
        epsilon,
        weight,
        bias,
        cos,
        sin,
        slots,
        k_pool,
        v_pool,
        q,
        head_stride(k_pool),
        tokens,
        heads,
        len(k_pool),
        dim,
        columns,
        power_of_two(tokens),
        pairs,
        column_block(chosen, columns, tokens),
        plus_one,
        dependent,
        **options(chosen, dependent),
    )


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
    chosen = tile("rope_kv")
    tokens, heads, dim = q.shape
    kv_heads = len(k_pool)
    rotary_dim = cos.shape[-1]
    _rope_kv[(tokens, blocks(heads + 2 * kv_heads, chosen.rows))](
        qkv,
        query_norm,
        key_norm,
        cos,
        sin,
        slots,
        k_pool,
        v_pool,
        q,
        head_stride(k_pool),
        epsilon,
        heads,
        kv_heads,
        dim,
        rotary_dim,
        chosen.rows,
        power_of_two(dim),
        plus_one,
        **options(chosen),
    )


@kernel
def _norm_qkv_rope_kv(
    x_ptr,
    norm_ptr,
    epsilon,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    q_ptr,
    head_stride,
    token_count,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_next_kernel(DEPENDENT)
    HALF: tl.constexpr = DIM // 2
    head = tl.program_id(0)  # queries, then keys, then values
    pairs = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    within = pairs < HALF
    tokens = tl.arange(0, TOKENS)
    token_mask = tokens < token_count
    first_rows = head * DIM + pairs
    first, second = row_product_pairs(
        x_ptr, norm_ptr, epsilon, weight_ptr, first_rows, HALF, within, tokens, token_mask,
        COLUMNS, BLOCK, PLUS_ONE, DEPENDENT,
    )  # fmt: skip
    if bias_ptr is not None:
        first += tl.load(bias_ptr + first_rows, within, 0.0).to(tl.float32)[None, :]
        second += tl.load(bias_ptr + first_rows + HALF, within, 0.0).to(tl.float32)[None, :]
    mask = token_mask[:, None] & within[None, :]
    is_value = head >= HEADS + KV_HEADS
    if not is_value:
        angles = tokens[:, None] * DIM + pairs[None, :]
        cos = tl.load(cos_ptr + angles, mask, 0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles + HALF, mask, 0.0).to(tl.float32)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    if head < HEADS:
        target = q_ptr + (tokens[:, None] * HEADS + head) * DIM + pairs[None, :]
    else:
        kv_head = (head - HEADS) % KV_HEADS
        slots = tl.load(slots_ptr + tokens, token_mask, 0).to(tl.int64)
        pool_ptr = v_ptr if is_value else k_ptr
        target = pool_ptr + kv_head.to(tl.int64) * head_stride + slots[:, None] * DIM + pairs[None, :]
    tl.store(target, first.to(q_ptr.dtype.element_ty), mask)
    tl.store(target + HALF, second.to(q_ptr.dtype.element_ty), mask)


@kernel
def _rope_kv(
    qkv_ptr,
    query_norm_ptr,
    key_norm_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    q_ptr,
    head_stride,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    HALF: tl.constexpr = ROTARY // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    within = dims < DIM
    mask = (heads < HEADS + 2 * KV_HEADS)[:, None] & within[None, :]
    source = qkv_ptr + token * (HEADS + 2 * KV_HEADS) * DIM + heads[:, None] * DIM
    # Each dimension and the one it turns with: the other half of the rotated part, or itself beyond that.
    partners = tl.where(dims < HALF, dims + HALF, tl.where(dims < ROTARY, dims - HALF, dims))
    x = tl.load(source + dims[None, :], mask, 0.0).to(tl.float32)
    partner = tl.load(source + partners[None, :], mask, 0.0).to(tl.float32)
    is_query = heads < HEADS
    is_value = heads >= HEADS + KV_HEADS
    plain = x
    if query_norm_ptr is not None:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / DIM + epsilon)[:, None]
        for_query = scale_of_norm(query_norm_ptr, dims, within, PLUS_ONE)
        for_key = scale_of_norm(key_norm_ptr, dims, within, PLUS_ONE)
        x = x * inverse * tl.where(is_query[:, None], for_query[None, :], for_key[None, :])
        for_query = scale_of_norm(query_norm_ptr, partners, within, PLUS_ONE)
        for_key = scale_of_norm(key_norm_ptr, partners, within, PLUS_ONE)
        partner = partner * inverse * tl.where(is_query[:, None], for_query[None, :], for_key[None, :])
    turns = dims < ROTARY
    cos = tl.load(cos_ptr + token * ROTARY + dims, turns, 1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * ROTARY + dims, turns, 0.0).to(tl.float32)
    y = x * cos[None, :] + partner * sin[None, :]
    y = tl.where(is_value[:, None], plain, y).to(q_ptr.dtype.element_ty)

    query_place = q_ptr + (token * HEADS + heads)[:, None] * DIM + dims[None, :]
    tl.store(query_place, y, mask & is_query[:, None])
    slot = tl.load(slots_ptr + token).to(tl.int64)
    pool_heads = ((heads - HEADS) % KV_HEADS).to(tl.int64)
    pool_place = pool_heads[:, None] * head_stride + slot * DIM + dims[None, :]
    tl.store(k_ptr + pool_place, y, mask & (~is_query & ~is_value)[:, None])
    tl.store(v_ptr + pool_place, y, mask & is_value[:, None])
