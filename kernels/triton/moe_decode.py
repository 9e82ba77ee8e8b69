"""A mixture of experts for a few tokens: the router, then each chosen expert's rows straight from its weights.

    router          norm, a logit per expert, softmax, the best few
    expert_gate_up  norm, gate and up rows of each chosen expert and of the shared one, in one launch
    expert_down     the weighted sum over the experts in the order of their choice, the shared one, the residual

Nothing is sorted: up to about 64 (token, expert) pairs reading weights twice costs less than grouping tokens.
"""

import torch
import triton
import triton.language as tl

from quartet.kernels.triton.common import (
    NEGATIVE_INFINITY,
    activate,
    blocks,
    column_block,
    comes_last,
    options,
    power_of_two,
    row_product_pairs,
    row_products,
)
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import tile


def router(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    weight: torch.Tensor,
    shared_gate: torch.Tensor | None,
    renormalize: bool,
    logits: torch.Tensor,
    counters: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.router."""
    chosen = tile("router")
    tokens, columns = x.shape
    experts, top_k = len(weight), ids.shape[1]
    tiles = blocks(experts, chosen.rows) + (shared_gate is not None)
    _router[(tiles, tokens)](
        x,
        norm_weight,
        epsilon,
        weight,
        shared_gate,
        logits,
        counters,
        ids,
        weights,
        logits.stride(0),
        weights.stride(0),
        experts,
        power_of_two(experts),
        top_k,
        power_of_two(top_k),
        renormalize,
        columns,
        chosen.rows,
        column_block(chosen, columns, 1),
        plus_one,
        **options(chosen),
    )


def choose_experts(
    logits: torch.Tensor,
    renormalize: bool,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.choose_experts."""
    chosen = tile("router")
    tokens, experts = logits.shape
    top_k = ids.shape[1]
    _choose_experts[(tokens,)](
        logits,
        ids,
        weights,
        weights.stride(0),
        experts,
        power_of_two(experts),
        top_k,
        power_of_two(top_k),
        renormalize,
        **options(chosen),
    )


def expert_gate_up(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.expert_gate_up."""
    chosen = tile("expert_gate_up")
    tokens, columns = x.shape
    size, top_k = gate_up.shape[1] // 2, ids.shape[1]
    shared_size = 0 if shared_gate_up is None else len(shared_gate_up) // 2
    tiles = top_k * blocks(size, chosen.rows) + blocks(shared_size, chosen.rows)
    _expert_gate_up[(tiles, tokens)](
        x,
        norm_weight,
        epsilon,
        ids,
        gate_up,
        shared_gate_up,
        out,
        top_k,
        size,
        shared_size,
        columns,
        chosen.rows,
        column_block(chosen, columns, 1),
        plus_one,
        activation,
        **options(chosen),
    )


def expert_down(
    inner: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    down: torch.Tensor,
    shared_down: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.expert_down."""
    chosen = tile("expert_down")
    tokens, hidden = out.shape
    size, top_k = down.shape[2], ids.shape[1]
    shared_size = 0 if shared_down is None else shared_down.shape[1]
    _expert_down[(blocks(hidden, chosen.rows), tokens)](
        inner,
        ids,
        weights,
        down,
        shared_down,
        residual,
        out,
        weights.stride(0),
        top_k,
        size,
        shared_size,
        hidden,
        chosen.rows,
        column_block(chosen, size, 1),
        column_block(chosen, max(shared_size, 1), 1),
        **options(chosen),
    )


@triton.jit
def _choose(
    logits,
    experts,
    ids_ptr,
    weights_ptr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """The best TOP_K of one token's logits (experts,), padded with minus infinity, to its ids and weights."""
    shares = tl.exp(logits - tl.max(logits, 0))
    left = shares / tl.sum(shares, 0)
    places = tl.arange(0, BLOCK_K)
    ids = tl.zeros((BLOCK_K,), tl.int32)
    weights = tl.zeros((BLOCK_K,), tl.float32)
    for place in tl.static_range(TOP_K):
        best = tl.max(left, 0)
        # The first of equals. Were all of them NaN, the last expert would do: an id must never point outside.
        expert = tl.min(tl.where(left == best, experts, EXPERTS - 1), 0)
        ids = tl.where(places == place, expert, ids)
        weights = tl.where(places == place, best, weights)
        left = tl.where(experts == expert, -1.0, left)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 0)
    mask = places < TOP_K
    tl.store(ids_ptr + places, ids, mask)
    tl.store(weights_ptr + places, weights, mask)


@kernel
def _choose_experts(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    weights_stride,
    EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    token = tl.program_id(0)
    experts = tl.arange(0, BLOCK_EXPERTS)
    logits = tl.load(logits_ptr + token * EXPERTS + experts, experts < EXPERTS, NEGATIVE_INFINITY).to(tl.float32)
    _choose(
        logits, experts, ids_ptr + token * TOP_K, weights_ptr + token * weights_stride,
        EXPERTS, TOP_K, BLOCK_K, RENORMALIZE,
    )  # fmt: skip


@kernel
def _router(
    x_ptr,
    norm_ptr,
    epsilon,
    weight_ptr,
    shared_gate_ptr,
    logits_ptr,
    counters_ptr,
    ids_ptr,
    weights_ptr,
    logits_stride,
    weights_stride,
    EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    token = tl.program_id(1)
    offsets = tl.arange(0, ROWS)
    rows = first_row + offsets
    within = rows < EXPERTS
    places = rows
    own_weight_ptr = weight_ptr
    if shared_gate_ptr is not None and first_row >= EXPERTS:  # the tile of the one row that is not an expert's
        rows = offsets
        within = offsets < 1
        places = offsets + EXPERTS
        own_weight_ptr = shared_gate_ptr
    sums = row_products(
        x_ptr, norm_ptr, epsilon, own_weight_ptr, rows, within, token + tl.arange(0, 1), tl.full((1,), True, tl.int1),
        COLUMNS, BLOCK, PLUS_ONE, False,
    )  # fmt: skip
    own_logits_ptr = logits_ptr + token * logits_stride
    tl.store(own_logits_ptr + places, tl.reshape(sums, (ROWS,)), within)
    if not comes_last(counters_ptr + token, tl.num_programs(0)):
        return
    experts = tl.arange(0, BLOCK_EXPERTS)
    logits = tl.load(own_logits_ptr + experts, experts < EXPERTS, NEGATIVE_INFINITY, cache_modifier=".cg")
    own_weights_ptr = weights_ptr + token * weights_stride
    _choose(
        logits, experts, ids_ptr + token * TOP_K, own_weights_ptr,
        EXPERTS, TOP_K, BLOCK_K, RENORMALIZE,
    )  # fmt: skip
    if shared_gate_ptr is not None:
        logit = tl.load(own_logits_ptr + EXPERTS, cache_modifier=".cg")
        tl.store(own_weights_ptr + TOP_K, tl.sigmoid(logit))


@kernel
def _expert_gate_up(
    x_ptr,
    norm_ptr,
    epsilon,
    ids_ptr,
    weight_ptr,
    shared_ptr,
    out_ptr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    SHARED_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    TILES: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    program = tl.program_id(0)
    token = tl.program_id(1)
    if program < TOP_K * TILES:
        slot = program // TILES
        expert = tl.load(ids_ptr + token * TOP_K + slot).to(tl.int64)
        own_weight_ptr = weight_ptr + expert * 2 * SIZE * COLUMNS
        rows = program % TILES * ROWS + tl.arange(0, ROWS)
        size = SIZE
        place = slot * SIZE
    else:
        own_weight_ptr = weight_ptr if shared_ptr is None else shared_ptr
        rows = (program - TOP_K * TILES) * ROWS + tl.arange(0, ROWS)
        size = SHARED_SIZE
        place = TOP_K * SIZE
    within = rows < size
    gate, up = row_product_pairs(
        x_ptr, norm_ptr, epsilon, own_weight_ptr, rows, size, within,
        token + tl.arange(0, 1), tl.full((1,), True, tl.int1), COLUMNS, BLOCK, PLUS_ONE, False,
    )  # fmt: skip
    y = tl.reshape(activate(gate, ACTIVATION) * up, (ROWS,))
    out_place = token.to(tl.int64) * (TOP_K * SIZE + SHARED_SIZE) + place + rows
    tl.store(out_ptr + out_place, y.to(out_ptr.dtype.element_ty), within)


@kernel
def _expert_down(
    inner_ptr,
    ids_ptr,
    weights_ptr,
    down_ptr,
    shared_ptr,
    residual_ptr,
    out_ptr,
    weights_stride,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    SHARED_SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    within = rows < HIDDEN
    alone = tl.arange(0, 1)
    present = tl.full((1,), True, tl.int1)
    own_inner_ptr = inner_ptr + token.to(tl.int64) * (TOP_K * SIZE + SHARED_SIZE)
    own_weights_ptr = weights_ptr + token * weights_stride
    sums = tl.zeros((1, ROWS), tl.float32)
    for slot in range(TOP_K):
        expert = tl.load(ids_ptr + token * TOP_K + slot).to(tl.int64)
        y = row_products(
            own_inner_ptr + slot * SIZE, None, 0.0, down_ptr + expert * HIDDEN * SIZE, rows, within,
            alone, present, SIZE, BLOCK, False, False,
        )  # fmt: skip
        sums += y * tl.load(own_weights_ptr + slot)
    if shared_ptr is not None:
        y = row_products(
            own_inner_ptr + TOP_K * SIZE, None, 0.0, shared_ptr, rows, within,
            alone, present, SHARED_SIZE, SHARED_BLOCK, False, False,
        )  # fmt: skip
        sums += y * tl.load(own_weights_ptr + TOP_K)
    y = tl.reshape(sums, (ROWS,))
    place = token.to(tl.int64) * HIDDEN + rows
    if residual_ptr is not None:
        y += tl.load(residual_ptr + place, within, 0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), within)
