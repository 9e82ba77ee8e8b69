"""Paged attention by our own kernel, where this machine has one; what it does not know goes to torch's.

A query's result depends on its own context alone, bit for bit.
"""

from array import array
from itertools import accumulate

import torch

from quartet.kernels.cpu.attention import paged_attention
from quartet.kernels.cpu.attention_schedule import Ragged
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.library import PageTable


def can_attend(dtype: torch.dtype, dim: int) -> bool:
    """Whether the kernel takes heads of this kind; waits until it is compiled."""
    kernels = native.library() if dtype is torch.bfloat16 else None
    return kernels is not None and kernels.can_attend(dim)


def paged_attention_native(
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
    if sinks is not None or (window is not None and not causal):
        return paged_attention(ragged, q, k_pool, v_pool, scale, window, softcap, causal, sinks)
    kernels = native.library()
    assert kernels is not None
    q = q.contiguous()
    out = torch.empty_like(q)
    kernels.attend(page_table(ragged), q, k_pool, v_pool, out, scale, window, softcap, causal)
    return out


def page_table(ragged: Ragged) -> PageTable:
    """The step's sequences as the kernel reads them, made once for all layers."""
    if ragged.table is None:
        check(ragged)
        pages, page_starts, last = array("i"), array("q"), 0
        for runs in ragged.runs:
            page_starts.append(len(pages))
            for first, count in runs:
                pages.extend(range(first, first + count))
                last = max(last, first + count)
        ragged.table = PageTable(
            starts=torch.tensor(list(accumulate(ragged.query_lengths, initial=0))),
            lengths=torch.tensor(ragged.context_lengths),
            pages=torch.frombuffer(pages, dtype=torch.int32),
            page_starts=torch.frombuffer(page_starts, dtype=torch.int64),
            page_size=ragged.page_size,
            most_tokens=last * ragged.page_size,
        )
    return ragged.table


def check(ragged: Ragged) -> None:
    """Raise AssertionError unless each sequence has queries, and pages for its context."""
    for queries, length, runs in zip(ragged.query_lengths, ragged.context_lengths, ragged.runs, strict=True):
        pages = sum(count for _, count in runs)
        assert 0 < queries <= length <= pages * ragged.page_size, (queries, length, pages)
