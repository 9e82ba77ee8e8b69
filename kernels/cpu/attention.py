"""Attention over a paged KV pool, for ragged batches of decode rows and prefill chunks, on the CPU.

The pool of a layer is (kv_heads, tokens, dim): the tokens of one page are neighbours within a head, so consecutive
pages form one (tokens, dim) matrix per head that needs no gathering. Four rules make this fast:

* the query heads that share a KV head are rows of one matrix; KV heads are never repeated;
* consecutive pages are attended on a view, scattered ones are gathered by whole pages;
* decode rows with little KV of their own go together in one padded call;
* rows that share their leading pages attend to them once, as one matrix product, and the partial results are merged
  by their log-sum-exp.

Which calls that takes is decided once a step (attention_schedule.py) and reused by every layer.
"""

from dataclasses import dataclass
from math import inf

import torch

from quartet.kernels.cpu.attention_schedule import ChunkCall, Ragged, Schedule, Segment, page_list, schedule


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
    attend = Attend(k_pool, v_pool, scale, softcap, ragged.page_size, plan.scratch)
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


@dataclass(slots=True)
class Attend:
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
            result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=mask, scale=self.scale
            )
            return result, lse
        return self.explicit(q, k, v, mask, causal)

    def explicit(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same written out: (batch, heads, rows, dim) and the logarithm of each row's sum of exponentials."""
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


def _decode(plan: Schedule, q: torch.Tensor, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
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


def _chunk(chunk: ChunkCall, q: torch.Tensor, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """One prefill chunk: q (queries, kv_heads, group, dim) → result of the same shape and its log-sum-exp."""
    k, v = attend.keys(chunk.view, chunk.pages)
    queries = q.permute(1, 2, 0, 3)  # (kv_heads, group, queries, dim)
    results = []
    for block in chunk.blocks:
        rows = queries[:, :, block.first : block.last]
        keys, values = k[:, block.low : block.high], v[:, block.low : block.high]  # (kv_heads, keys, dim)
        if block.mask is None and not block.causal:
            folded, lse = attend(rows.flatten(1, 2).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), None)
            results.append((folded.view(rows.shape), lse.view(rows.shape[:3])))
        else:
            spread = [x.unsqueeze(1).expand(-1, rows.shape[1], -1, -1) for x in (keys, values)]  # no copy: stride 0
            results.append(attend(rows, spread[0], spread[1], block.mask, block.causal))
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
        pages = page_list(runs, 0, -(-length // size))
        slots = torch.tensor([page * size + i for page in pages for i in range(size)][:length])
        k = k_pool[:, slots].double().repeat_interleave(group, 0)  # (heads, length, dim)
        v = v_pool[:, slots].double().repeat_interleave(group, 0)
        for position in range(length - queries, length):
            last = position + 1 if causal else length if window is None else min(length, position + window)
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
