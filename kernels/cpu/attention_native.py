"""Paged attention by our own kernel, where this machine has one; what it does not know goes to torch's.

A query's result depends on its own context alone, bit for bit.
"""

from array import array
from collections.abc import Iterator
from itertools import accumulate

import torch

from quartet.kernels.cpu.attention import paged_attention
from quartet.kernels.cpu.attention_schedule import SHARE_ROWS, SHARE_TOKENS, Ragged, shared_pages
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.page_table import Groups, PageTable


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
            groups=groups(ragged),
        )
    return ragged.table


def groups(ragged: Ragged) -> Groups | None:
    """The sequences of one query that begin with the same pages, where computing these together pays.

    Of the keys in common the last ones of the shortest context stay out: every sequence has at least one of its own.
    """
    runs, contexts = ragged.runs, ragged.context_lengths
    single = [i for i, queries in enumerate(ragged.query_lengths) if queries == 1 and contexts[i] > SHARE_TOKENS]
    if len({runs[i][0][0] for i in single}) + SHARE_ROWS > len(single) + 1:
        return None
    found = [(members, keys) for members, keys in neighbours(ragged, sorted(single, key=runs.__getitem__)) if keys]
    if not found:
        return None
    grouped = {member for members, _ in found for member in members}
    others = [i for i in reversed(range(len(runs))) if i not in grouped]  # long ones, prompts, come last
    members = [member for some, _ in found for member in some] + others
    sharing = [(len(some), keys) for some, keys in found] + [(1, 0)] * len(others)
    return Groups(torch.tensor(members), torch.tensor(sharing))


def neighbours(ragged: Ragged, order: list[int]) -> Iterator[tuple[list[int], int]]:
    """Sequences cut into groups of neighbours, and the keys that a group has in common, or 0 where they do not pay.

    A sequence joins those before it unless they had to give up more than half of what they share.
    """
    size, members, common = ragged.page_size, order[:1], 0
    for sequence in order[1:]:
        shared = shared_pages(ragged.runs[members[-1]], ragged.runs[sequence]) * size
        own = min(ragged.context_lengths[sequence], ragged.context_lengths[members[0]]) - 1
        shared = min(shared, own, common or shared) // SHARE_TOKENS * SHARE_TOKENS
        if shared and 2 * shared >= common:
            members.append(sequence)
            common = shared
            continue
        yield members, common if len(members) >= SHARE_ROWS else 0
        members, common = [sequence], 0
    yield members, common if len(members) >= SHARE_ROWS else 0


def check(ragged: Ragged) -> None:
    """Raise AssertionError unless each sequence has queries, and pages for its context."""
    for queries, length, runs in zip(ragged.query_lengths, ragged.context_lengths, ragged.runs, strict=True):
        pages = sum(count for _, count in runs)
        assert 0 < queries <= length <= pages * ragged.page_size, (queries, length, pages)
