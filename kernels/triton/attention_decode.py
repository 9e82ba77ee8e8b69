"""Paged attention of decode rows: one query per sequence against its whole context.

    program (row, kv head, split)   the query heads that share a KV head, as rows of one product, see `KV_SPLIT` keys
    the last split of a row to end  joins the partial results by their log-sum-exp, in the order of the splits

A split is a fixed number of keys from the context's beginning, never a share of it: the sums of a row are the same in
every batch.
"""

from functools import partial

import torch
import triton.language as tl

from quartet.kernels.triton.common import (
    NEGATIVE_INFINITY,
    blocks,
    comes_last,
    head_stride,
    options,
    power_of_two,
    start_next_kernel,
    tanh,
    wait_for_inputs,
)
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import KV_SPLIT, tile


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
    *,
    dependent: bool = False,
) -> None:
    """See kernels.operations.Ops.paged_decode."""
    chosen = tile("paged_decode")
    rows, heads, dim = q.shape
    kv_heads = len(k_pool)
    group = heads // kv_heads
    splits = blocks(longest, KV_SPLIT)
    _paged_decode[(rows, kv_heads, splits)](
        q,
        k_pool,
        v_pool,
        page_table,
        table_rows,
        lengths,
        sinks,
        partials,
        counters,
        out,
        page_table.stride(0),
        head_stride(k_pool),
        splits,
        scale,
        0.0 if softcap is None else softcap,
        window or 0,
        softcap is not None,
        heads,
        group,
        dim,
        max(chosen.rows, power_of_two(group)),
        power_of_two(dim),
        page_size,
        chosen.columns,
        KV_SPLIT,
        dependent,
        **options(chosen, dependent),
    )


def decode_workspace(rows: int, heads: int, kv_heads: int, dim: int, longest: int) -> tuple[int, int]:
    """Elements of the partials and of the counters."""
    return rows * heads * blocks(longest, KV_SPLIT) * (dim + 2), rows * kv_heads


@partial(kernel, do_not_specialize=["splits"])
def _paged_decode(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    table_rows_ptr,
    lengths_ptr,
    sinks_ptr,
    partials_ptr,
    counters_ptr,
    out_ptr,
    table_stride,
    head_stride,
    splits,
    scale,
    softcap,
    window,
    SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_next_kernel(DEPENDENT)
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    low = tl.maximum(length - window, 0) if window else 0
    first_split = low // SPLIT
    last_split = tl.cdiv(length, SPLIT)
    members = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    heads = kv_head * GROUP + members
    mask = (members < GROUP)[:, None] & (dims < DIM)[None, :]
    place = (row * HEADS + heads)[:, None] * DIM + dims[None, :]
    if length == 0:
        if split == 0:
            tl.store(out_ptr + place, tl.zeros((BLOCK_GROUP, BLOCK_DIM), out_ptr.dtype.element_ty), mask)
        return
    if (split < first_split) | (split >= last_split):
        return

    table_row = row if table_rows_ptr is None else tl.load(table_rows_ptr + row)
    pages_ptr = table_ptr + table_row.to(tl.int64) * table_stride
    q = tl.load(q_ptr + place, mask, 0.0)
    begin = tl.maximum(split * SPLIT, low // BLOCK * BLOCK)
    end = tl.minimum((split + 1) * SPLIT, length)
    largest = tl.full((BLOCK_GROUP,), NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    mixed = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for start in range(begin, end, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = (keys >= low) & (keys < end)
        pages = tl.load(pages_ptr + keys // PAGE, seen, 0).to(tl.int64)
        tokens = kv_head.to(tl.int64) * head_stride + (pages * PAGE + keys % PAGE) * DIM
        key_mask = seen[:, None] & (dims < DIM)[None, :]
        k = tl.load(k_ptr + tokens[:, None] + dims[None, :], key_mask, 0.0)
        v = tl.load(v_ptr + tokens[:, None] + dims[None, :], key_mask, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (group, keys)
        if SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where(seen[None, :], scores, NEGATIVE_INFINITY)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - new_largest)
        weights = tl.exp(scores - new_largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        largest = new_largest

    if last_split - first_split > 1:
        parts = (row * HEADS + heads) * splits  # partials are (rows, heads, splits), dim after dim, then two numbers
        own = (parts + split).to(tl.int64) * (DIM + 2)
        tl.store(partials_ptr + own[:, None] + dims[None, :], mixed, mask)
        tl.store(partials_ptr + own + DIM, largest, members < GROUP)
        tl.store(partials_ptr + own + DIM + 1, total, members < GROUP)
        counter = counters_ptr + row * tl.num_programs(1) + kv_head
        if not comes_last(counter, last_split - first_split):
            return
        largest = tl.full((BLOCK_GROUP,), NEGATIVE_INFINITY, tl.float32)
        total = tl.zeros((BLOCK_GROUP,), tl.float32)
        mixed = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
        for other in range(first_split, last_split):
            theirs = (parts + other).to(tl.int64) * (DIM + 2)
            part = tl.load(partials_ptr + theirs[:, None] + dims[None, :], mask, 0.0, cache_modifier=".cg")
            peak = tl.load(partials_ptr + theirs + DIM, members < GROUP, 0.0, cache_modifier=".cg")
            share = tl.load(partials_ptr + theirs + DIM + 1, members < GROUP, 0.0, cache_modifier=".cg")
            new_largest = tl.maximum(largest, peak)
            shrink = tl.exp(largest - new_largest)
            grow = tl.exp(peak - new_largest)
            total = total * shrink + share * grow
            mixed = mixed * shrink[:, None] + part * grow[:, None]
            largest = new_largest

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads, members < GROUP, 0.0).to(tl.float32)
        new_largest = tl.maximum(largest, sink)
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.exp(sink - new_largest)
        mixed = mixed * shrink[:, None]
    tl.store(out_ptr + place, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask)
