"""Paged attention of several new tokens per sequence: prefill chunks, and drafts to be verified.

A program packs (token, head of the group) pairs of one sequence and one KV head into its rows. The keys, those of the
new tokens included, lie in the pool already. Whole tiles that every row sees need no mask; those at the diagonal and
at the edges of a window do.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from quartet.kernels.triton.common import NEGATIVE_INFINITY, blocks, head_stride, options, power_of_two, tanh
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import tile

WIDE_DIM = 128  # beyond, a tile of 64 keys would not fit the registers


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
    _, heads, dim = q.shape
    chosen = tile("paged_extend_wide" if dim > WIDE_DIM else "paged_extend")
    kv_heads = len(k_pool)
    group = heads // kv_heads
    grid = (blocks(most_queries * group, chosen.rows), len(lengths), kv_heads)
    _paged_extend[grid](
        q,
        k_pool,
        v_pool,
        page_table,
        table_rows,
        starts,
        lengths,
        sinks,
        out,
        page_table.stride(0),
        head_stride(k_pool),
        scale,
        0.0 if softcap is None else softcap,
        window or 0,
        softcap is not None,
        window is not None,
        causal,
        heads,
        group,
        dim,
        chosen.rows,
        power_of_two(dim),
        page_size,
        chosen.columns,
        **options(chosen),
    )


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    pages_ptr,
    begin,
    end,
    first_key,
    last_key,
    largest,
    total,
    mixed,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The keys [begin, end) in tiles. Where MASKED, a row sees those from its first_key up to before its last_key."""
    dims = tl.arange(0, BLOCK_DIM)
    for start in range(begin, end, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        present = keys < end
        pages = tl.load(pages_ptr + keys // PAGE, present, 0).to(tl.int64)
        tokens = (pages * PAGE + keys % PAGE) * DIM
        key_mask = present[:, None] & (dims < DIM)[None, :]
        k = tl.load(k_ptr + tokens[:, None] + dims[None, :], key_mask, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (rows, keys)
        if SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        if MASKED:
            seen = (keys[None, :] >= first_key[:, None]) & (keys[None, :] < last_key[:, None])
            scores = tl.where(seen, scores, NEGATIVE_INFINITY)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A masked row that has seen no key yet has no finite largest.
        origin = tl.where(new_largest == NEGATIVE_INFINITY, 0.0, new_largest) if MASKED else new_largest
        shrink = tl.exp(largest - origin)
        weights = tl.exp(scores - origin[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + tokens[:, None] + dims[None, :], key_mask, 0.0)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return largest, total, mixed


@partial(kernel, do_not_specialize_on_alignment=["table_rows_ptr", "starts_ptr", "lengths_ptr"])
def _paged_extend(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    table_rows_ptr,
    starts_ptr,
    lengths_ptr,
    sinks_ptr,
    out_ptr,
    table_stride,
    head_stride,
    scale,
    softcap,
    window,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The last tiles of a causal sequence have the most keys, so they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = tl.program_id(1)
    kv_head = tl.program_id(2)
    start = tl.load(starts_ptr + sequence).to(tl.int64)
    queries = (tl.load(starts_ptr + sequence + 1) - start).to(tl.int32)
    if block * ROWS >= queries * GROUP:
        return
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    context = length - queries  # positions before the first query
    packed = block * ROWS + tl.arange(0, ROWS)
    queries_of_rows = packed // GROUP
    heads = kv_head * GROUP + packed % GROUP
    dims = tl.arange(0, BLOCK_DIM)
    mask = (queries_of_rows < queries)[:, None] & (dims < DIM)[None, :]
    place = ((start + queries_of_rows) * HEADS + heads)[:, None] * DIM + dims[None, :]
    q = tl.load(q_ptr + place, mask, 0.0)

    first_query = block * ROWS // GROUP
    last_query = tl.minimum(((block + 1) * ROWS - 1) // GROUP, queries - 1)
    positions = context + queries_of_rows
    if CAUSAL:
        last_key = tl.minimum(positions + 1, length)
        whole_end = (context + first_query + 1) // BLOCK * BLOCK
        end = context + last_query + 1
    else:
        last_key = tl.full((ROWS,), 0, tl.int32) + length
        whole_end = length // BLOCK * BLOCK
        end = length
    if WINDOW:
        first_key = tl.maximum(positions - window + 1, 0)
        begin = tl.maximum(context + first_query - window + 1, 0) // BLOCK * BLOCK
        whole_begin = tl.cdiv(tl.maximum(context + last_query - window + 1, 0), BLOCK) * BLOCK
        whole_begin = tl.minimum(whole_begin, end)
        whole_end = tl.maximum(whole_end, whole_begin)
    else:
        first_key = tl.zeros((ROWS,), tl.int32)
        begin = 0
        whole_begin = 0

    table_row = sequence if table_rows_ptr is None else tl.load(table_rows_ptr + sequence)
    pages_ptr = table_ptr + table_row.to(tl.int64) * table_stride
    own_k_ptr = k_ptr + kv_head.to(tl.int64) * head_stride
    own_v_ptr = v_ptr + kv_head.to(tl.int64) * head_stride
    largest = tl.full((ROWS,), NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    if WINDOW:
        largest, total, mixed = _attend(
            q, own_k_ptr, own_v_ptr, pages_ptr, begin, whole_begin, first_key, last_key, largest, total, mixed,
            scale, softcap, SOFTCAP, True, DIM, BLOCK_DIM, PAGE, BLOCK,
        )  # fmt: skip
    # Rows that see nothing in the window's first tiles meet their first key in a whole tile or at the diagonal.
    largest, total, mixed = _attend(
        q, own_k_ptr, own_v_ptr, pages_ptr, whole_begin, whole_end, first_key, last_key, largest, total, mixed,
        scale, softcap, SOFTCAP, False, DIM, BLOCK_DIM, PAGE, BLOCK,
    )  # fmt: skip
    largest, total, mixed = _attend(
        q, own_k_ptr, own_v_ptr, pages_ptr, whole_end, end, first_key, last_key, largest, total, mixed,
        scale, softcap, SOFTCAP, True, DIM, BLOCK_DIM, PAGE, BLOCK,
    )  # fmt: skip
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads).to(tl.float32)
        new_largest = tl.maximum(largest, sink)
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.exp(sink - new_largest)
        mixed = mixed * shrink[:, None]
    total = tl.where(total == 0.0, 1.0, total)  # of a sequence without keys, which gets zeros
    tl.store(out_ptr + place, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask)
