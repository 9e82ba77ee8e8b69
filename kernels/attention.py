"""Attention over a paged KV pool, for ragged batches of decode rows and prefill chunks, on the CPU.

The pool of a layer is (kv_heads, tokens, dim): the tokens of one page are neighbours within a head, so consecutive
pages form one (tokens, dim) matrix per head that needs no gathering. Four rules make this fast:

* the query heads that share a KV head are rows of one matrix; KV heads are never repeated;
* consecutive pages are attended on a view, scattered ones are gathered by whole pages;
* decode rows with little KV of their own go together in one padded call;
* rows that share their leading pages attend to them once, as one matrix product, and the partial results are merged
  by their log-sum-exp.

What a step does is decided once, in `schedule`, and reused by every layer.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import torch

Run = tuple[int, int]  # (first page, number of consecutive pages)
Segment = tuple[int, int]  # (first token slot, number of consecutive tokens)

BATCH_BYTES = 256 << 10  # decode rows with less KV than this share a padded call (Ragged.batch_bytes)
SHARE_ROWS = 4  # fewer rows do not repay the merge
SHARE_TOKENS = 128
MAX_VIEWS = 4  # a row scattered over more segments is gathered
BLOCK_QUERIES = 128  # rows of an explicit score matrix


@dataclass(slots=True)
class Ragged:
    """One step's sequences, side by side: the last `query_lengths[i]` of `context_lengths[i]` positions are queries."""

    query_lengths: list[int]
    context_lengths: list[int]
    runs: list[list[Run]]  # the pages of each sequence
    page_size: int
    batch_bytes: int = BATCH_BYTES
    schedules: dict[tuple[object, ...], "Schedule"] = field(default_factory=dict)


@dataclass(slots=True)
class DecodeCall:
    """Some decode rows against some keys; the result is partial number `part` of those rows."""

    rows: torch.Tensor | slice
    part: int = 0
    view: Segment | None = None  # keys of all the rows, on a view
    pages: torch.Tensor | None = None  # or pages to gather: (rows * pages of a row,)
    mask: torch.Tensor | None = None  # (1, rows, 1, gathered tokens), with `pages`


@dataclass(slots=True)
class Block:
    """Queries [first, last) of a chunk against its keys [low, high)."""

    first: int
    last: int
    low: int
    high: int
    causal: bool = False
    mask: torch.Tensor | None = None  # (queries, keys)


@dataclass(slots=True)
class ChunkCall:
    """A prefill chunk: token rows, where its keys are, and the blocks whose results are merged per query."""

    rows: slice
    view: Segment | None
    pages: torch.Tensor | None
    length: int
    blocks: list[Block]


@dataclass(slots=True)
class Schedule:
    decode_rows: torch.Tensor | slice | None = None  # token rows of the decode rows
    parts: int = 1
    decode: list[DecodeCall] = field(default_factory=list)  # rows count among the decode rows
    chunks: list[ChunkCall] = field(default_factory=list)
    scratch: list[torch.Tensor] = field(default_factory=list)  # for gathered keys and values, kept from layer to layer


def paged_attention(
    ragged: Ragged,
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q (tokens, heads, dim) against pools (kv_heads, pool tokens, dim) → (tokens, heads, dim)."""
    kv_heads, _, dim = k_pool.shape
    plan = schedule(ragged, q, k_pool, window, softcap, causal)
    grouped = q.view(len(q), kv_heads, -1, dim)  # (tokens, kv_heads, group, dim)
    out = torch.empty_like(grouped)
    lse = q.new_empty(grouped.shape[:3], dtype=torch.float32) if sinks is not None else None
    attend = _Attend(k_pool, v_pool, scale, softcap, ragged.page_size, plan.scratch)
    if plan.decode_rows is not None:
        result, result_lse = _decode(plan, grouped[plan.decode_rows], attend)
        out[plan.decode_rows] = result
        if lse is not None:
            lse[plan.decode_rows] = result_lse
    for chunk in plan.chunks:
        result, result_lse = _chunk(chunk, grouped[chunk.rows], attend)
        out[chunk.rows] = result
        if lse is not None:
            lse[chunk.rows] = result_lse
    if sinks is not None and lse is not None:
        kept = torch.sigmoid(lse - sinks.float().view(kv_heads, -1))  # (tokens, kv_heads, group)
        out = out * kept.unsqueeze(-1).to(out.dtype)
    return out.view(q.shape)


# What to do


def schedule(
    ragged: Ragged, q: torch.Tensor, k_pool: torch.Tensor, window: int | None, softcap: float | None, causal: bool
) -> Schedule:
    """The calls that cover a step's attention; made once for all layers of the same shape."""
    if window is not None and window >= max(ragged.context_lengths):
        window = None
    token_bytes = 2 * k_pool.shape[0] * k_pool.shape[2] * k_pool.element_size()
    key = (window, softcap is None, causal, token_bytes, q.dtype)
    if key not in ragged.schedules:
        ragged.schedules[key] = _Scheduler(ragged, window, softcap is not None, causal, token_bytes, q).build()
    return ragged.schedules[key]


def segments(runs: list[Run], page_size: int, low: int, high: int) -> list[Segment]:
    """Where the KV of positions [low, high) lies, in order."""
    found: list[Segment] = []
    begin = 0
    for page, count in runs:
        end = begin + count * page_size
        first, last = max(low, begin), min(high, end)
        if first < last:
            found.append((page * page_size + first - begin, last - first))
        begin = end
    return found


def shared_pages(left: list[Run], right: list[Run]) -> int:
    """Number of leading pages that two sequences have in common."""
    common = 0
    for (left_page, left_count), (right_page, right_count) in zip(left, right, strict=False):
        if left_page != right_page:
            break
        common += min(left_count, right_count)
        if left_count != right_count:
            break
    return common


@dataclass(slots=True)
class _Scheduler:
    """Builds one Schedule."""

    ragged: Ragged
    window: int | None
    explicit: bool  # scores are materialised, so queries come in blocks
    causal: bool
    token_bytes: int
    like: torch.Tensor  # dtype and device of masks
    plan: Schedule = field(default_factory=Schedule)

    def build(self) -> Schedule:
        ragged, row = self.ragged, 0
        decode: list[tuple[int, int]] = []  # (sequence, token row)
        for sequence, length in enumerate(ragged.query_lengths):
            if length == 1:
                decode.append((sequence, row))
            elif length:
                self.plan.chunks.append(self.chunk(sequence, row))
            row += length
        if decode:
            self.plan.decode_rows = self.rows([row for _, row in decode])
            self.decode([sequence for sequence, _ in decode])
        return self.plan

    def rows(self, rows: list[int]) -> torch.Tensor | slice:
        """A slice where the rows are neighbours, else an index."""
        if all(b == a + 1 for a, b in pairwise(rows)):
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, device=self.like.device)

    def decode(self, sequences: list[int]) -> None:
        lengths, runs = self.ragged.context_lengths, self.ragged.runs
        low = [0 if self.window is None else max(0, lengths[s] - self.window) for s in sequences]
        parts = [0] * len(sequences)
        if self.window is None:
            for members, pages in self.shared_groups(sequences):
                tokens = pages * self.ragged.page_size
                for part, view in enumerate(segments(runs[sequences[members[0]]], self.ragged.page_size, 0, tokens)):
                    self.plan.decode.append(DecodeCall(self.rows(members), part, view=view))
                    for member in members:
                        parts[member], low[member] = part + 1, tokens
        classes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, sequence in enumerate(sequences):
            classes[self.batch_class(lengths[sequence] - low[row], parts[row])].append(row)
        for (size_class, part), members in classes.items():
            spans = [(runs[sequences[row]], low[row], lengths[sequences[row]]) for row in members]
            if size_class and len(members) > 1:
                self.padded_call(members, part, spans)
                self.plan.parts = max(self.plan.parts, part + 1)
            else:
                for row, span in zip(members, spans, strict=True):
                    self.plan.parts = max(self.plan.parts, self.single_calls(row, part, *span))

    def batch_class(self, tokens: int, part: int) -> tuple[int, int]:
        """Rows of one class (not 0) share a padded call: short, and of similar length."""
        small = tokens * self.token_bytes <= self.ragged.batch_bytes
        pages = -(-tokens // self.ragged.page_size)
        return ((pages - 1).bit_length() + 1 if small else 0), part

    def shared_groups(self, sequences: list[int]) -> Iterator[tuple[list[int], int]]:
        """(rows, full pages all of them begin with), where attending to those once pays."""
        runs, page_size = self.ragged.runs, self.ragged.page_size
        by_first: dict[int, list[int]] = defaultdict(list)
        for row, sequence in enumerate(sequences):
            by_first[runs[sequence][0][0]].append(row)
        for members in by_first.values():
            if len(members) < SHARE_ROWS:
                continue
            first = runs[sequences[members[0]]]
            pages = min(shared_pages(first, runs[sequences[row]]) for row in members)
            # The query's own position stays out, so that every row keeps a tail of at least one token.
            pages = min(pages, *((self.ragged.context_lengths[sequences[row]] - 1) // page_size for row in members))
            if pages * page_size >= SHARE_TOKENS:
                yield members, pages

    def single_calls(self, row: int, part: int, runs: list[Run], low: int, high: int) -> int:
        """One row on views, or gathered where it is scattered. Returns the parts the row has now."""
        found = segments(runs, self.ragged.page_size, low, high)
        if len(found) > MAX_VIEWS:
            self.padded_call([row], part, [(runs, low, high)])
            return part + 1
        for view in found:
            self.plan.decode.append(DecodeCall(slice(row, row + 1), part, view=view))
            part += 1
        return part

    def padded_call(self, rows: list[int], part: int, spans: list[tuple[list[Run], int, int]]) -> None:
        """Rows with KV at positions [low, high) of their pages, gathered and padded with the null page."""
        size = self.ragged.page_size
        tables = [_page_list(runs, low // size, -(-high // size)) for runs, low, high in spans]
        width = max(map(len, tables))
        pages = torch.tensor([page for table in tables for page in table + [0] * (width - len(table))])
        bounds = torch.tensor([(low % size, low % size + high - low) for _, low, high in spans])  # (rows, 2)
        token = torch.arange(width * size)
        hidden = (token < bounds[:, :1]) | (token >= bounds[:, 1:])  # (rows, tokens)
        mask = self.bias(hidden).view(1, len(rows), 1, -1)
        self.plan.decode.append(DecodeCall(self.rows(rows), part, pages=pages.to(self.like.device), mask=mask))

    def bias(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(hidden.shape, dtype=self.like.dtype).masked_fill_(hidden, -inf).to(self.like.device)

    def chunk(self, sequence: int, row: int) -> ChunkCall:
        ragged = self.ragged
        queries, length = ragged.query_lengths[sequence], ragged.context_lengths[sequence]
        found = segments(ragged.runs[sequence], ragged.page_size, 0, length)
        pages = None
        if len(found) > 1:
            table = _page_list(ragged.runs[sequence], 0, -(-length // ragged.page_size))
            pages = torch.tensor(table, device=self.like.device)
        blocks = list(self.blocks(queries, length))
        return ChunkCall(slice(row, row + queries), found[0] if pages is None else None, pages, length, blocks)

    def blocks(self, queries: int, length: int) -> Iterator[Block]:
        start = length - queries
        if self.explicit or self.window is not None:
            for first in range(0, queries, BLOCK_QUERIES):
                yield self.masked_block(first, min(first + BLOCK_QUERIES, queries), start, length)
        elif not self.causal:
            yield Block(0, queries, 0, length)
        else:
            if start:
                yield Block(0, queries, 0, start)
            yield Block(0, queries, start, length, causal=True)

    def masked_block(self, first: int, last: int, start: int, length: int) -> Block:
        if not self.causal:
            return Block(first, last, 0, length)
        low = 0 if self.window is None else max(0, start + first - self.window + 1)
        high = start + last
        query = torch.arange(start + first, high).unsqueeze(1)  # positions
        key = torch.arange(low, high)
        hidden = key > query
        if self.window is not None:
            hidden |= key <= query - self.window
        return Block(first, last, low, high, mask=self.bias(hidden))


def _page_list(runs: list[Run], first: int, last: int) -> list[int]:
    """Pages number `first` to `last` of a sequence."""
    return [page + i for page, count in runs for i in range(count)][first:last]


# Doing it


@dataclass(slots=True)
class _Attend:
    """One layer's keys and values and the arithmetic of a single call."""

    k_pool: torch.Tensor  # (kv_heads, pool tokens, dim)
    v_pool: torch.Tensor
    scale: float
    softcap: float | None
    page_size: int
    scratch: list[torch.Tensor]

    def keys(self, view: Segment | None, pages: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V (kv_heads, tokens, dim): a view, or whole pages gathered."""
        if view is not None:
            slot, length = view
            return self.k_pool.narrow(1, slot, length), self.v_pool.narrow(1, slot, length)
        assert pages is not None
        kv_heads, _, dim = self.k_pool.shape
        size = kv_heads * len(pages) * self.page_size * dim
        if not self.scratch or len(self.scratch[0]) < size:
            # Fresh memory costs more than the copying, so all layers of a step use the same.
            self.scratch[:] = [self.k_pool.new_empty(size) for _ in range(2)]
        k, v = (
            self.gather(pool, pages, scratch[:size])
            for pool, scratch in zip((self.k_pool, self.v_pool), self.scratch, strict=True)
        )
        return k, v

    def gather(self, pool: torch.Tensor, pages: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        kv_heads, _, dim = pool.shape
        by_page = pool.view(kv_heads, -1, self.page_size * dim)
        torch.index_select(by_page, 1, pages, out=out.view(kv_heads, len(pages), -1))
        return out.view(kv_heads, -1, dim)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (batch, heads, rows, dim), k and v (batch, heads, keys, dim) → result and its log-sum-exp."""
        if self.softcap is None and q.device.type == "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=mask, scale=self.scale
            )
        return self.explicit(q, k, v, mask, causal)

    def explicit(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.matmul(q, k.mT).float().mul_(self.scale)  # (batch, heads, rows, keys)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if mask is not None:
            scores.add_(mask)
        if causal:
            rows, keys = scores.shape[-2:]
            scores.masked_fill_(torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu_(1), -inf)
        lse = torch.logsumexp(scores, -1)
        return torch.matmul(torch.softmax(scores, -1).to(v.dtype), v), lse


def _decode(plan: Schedule, q: torch.Tensor, attend: _Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """All decode rows: q (rows, kv_heads, group, dim) → the same shape, and log-sum-exp (rows, kv_heads, group)."""
    out = q.new_zeros((plan.parts, *q.shape))
    lse = q.new_full((plan.parts, *q.shape[:3]), -inf, dtype=torch.float32)
    for call in plan.decode:
        rows = q[call.rows].transpose(0, 1)  # (kv_heads, rows, group, dim)
        k, v = attend.keys(call.view, call.pages)
        if call.mask is not None:
            shape = (len(k), rows.shape[1], -1, k.shape[-1])  # keys by row
            result, result_lse = attend(rows, k.view(shape), v.view(shape), call.mask)
        else:
            result, result_lse = attend(rows.flatten(1, 2).unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), None)
        out[call.part, call.rows] = result.view(rows.shape).transpose(0, 1)
        lse[call.part, call.rows] = result_lse.view(rows.shape[:3]).transpose(0, 1)
    return merge(out, lse)


def _chunk(chunk: ChunkCall, q: torch.Tensor, attend: _Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """One prefill chunk: q (queries, kv_heads, group, dim) → result of the same shape and its log-sum-exp."""
    k, v = attend.keys(chunk.view, chunk.pages)
    queries = q.permute(1, 2, 0, 3)  # (kv_heads, group, queries, dim)
    k, v = (x.unsqueeze(1).expand(-1, queries.shape[1], -1, -1) for x in (k, v))
    results = []
    for block in chunk.blocks:
        rows = queries[:, :, block.first : block.last]
        keys = k[:, :, block.low : block.high], v[:, :, block.low : block.high]
        results.append(attend(rows, *keys, block.mask, block.causal))
    disjoint = len(results) > 1 and chunk.blocks[1].first > 0
    if len(results) == 1:
        out, lse = results[0]
    elif disjoint:
        out, lse = (torch.cat(part, 2) for part in zip(*results, strict=True))
    else:
        out, lse = merge(*(torch.stack(part) for part in zip(*results, strict=True)))
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def merge(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention over disjoint sets of keys: out (parts, ..., dim), lse (parts, ...)."""
    if len(out) == 1:
        return out[0], lse[0]
    weights = torch.softmax(lse, 0).unsqueeze(-1)
    return (out * weights).sum(0).to(out.dtype), torch.logsumexp(lse, 0)


# The specification


def paged_attention_reference(
    ragged: Ragged,
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain steps and float64, one query at a time."""
    heads, dim = q.shape[1:]
    group, size = heads // k_pool.shape[0], ragged.page_size
    out, row = torch.empty(q.shape, dtype=torch.float64), 0
    for queries, length, runs in zip(ragged.query_lengths, ragged.context_lengths, ragged.runs, strict=True):
        pages = _page_list(runs, 0, -(-length // size))
        slots = torch.tensor([page * size + i for page in pages for i in range(size)][:length])
        k = k_pool[:, slots].double().repeat_interleave(group, 0)  # (heads, length, dim)
        v = v_pool[:, slots].double().repeat_interleave(group, 0)
        for position in range(length - queries, length):
            last = position + 1 if causal else length
            first = 0 if window is None else max(0, position - window + 1)
            scores = (q[row].double().view(heads, 1, dim) @ k[:, first:last].mT).squeeze(1) * scale  # (heads, keys)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks.double().unsqueeze(1)), 1)
            weights = torch.softmax(scores, 1)[:, : last - first]
            out[row] = (weights.unsqueeze(1) @ v[:, first:last]).squeeze(1)
            row += 1
    return out
