"""Cases of paged attention."""

from itertools import accumulate
from math import nan
from typing import Any

import torch

from tests.kernels.cases import Arguments, Maker, cases


def pool(make: Maker, kv_heads: int, dim: int, page_size: int, lengths: list[int], table_rows: bool) -> Arguments:
    """Pools, tables and lengths; pages of a sequence are scattered, and what nobody owns is poison."""
    longest = max(lengths)
    pages = -(-longest // page_size)
    rows = len(lengths) + (2 if table_rows else 0)
    count = rows * pages + 1
    pools = [make.normal(kv_heads, count * page_size, dim) for _ in range(2)]
    table = torch.randperm(count - 1, generator=make.generator).view(rows, pages) + 1
    order = list(range(rows))[::-1][: len(lengths)] if table_rows else list(range(rows))
    for row, length in zip(order, lengths, strict=True):
        unused = table[row].repeat_interleave(page_size) * page_size + torch.arange(page_size).repeat(pages)
        for each in pools:
            each[:, unused[length:]] = nan
    return {
        "k_pool": pools[0],
        "v_pool": pools[1],
        "page_table": make.given(table.tolist()),
        "table_rows": make.given(order) if table_rows else None,
        "lengths": make.given(lengths),
        "page_size": page_size,
    }


def attention_facts(make: Maker, heads: int, dim: int, window: int | None, softcap: float | None, sinks: bool) -> Any:
    return {
        "scale": dim**-0.5,
        "window": window,
        "softcap": softcap,
        "sinks": make.normal(heads, dtype=torch.float32) if sinks else None,
    }


def paged_decode(
    make: Maker,
    heads: int,
    kv_heads: int,
    dim: int,
    lengths: list[int],
    page_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    table_rows: bool = False,
) -> Arguments:
    rows, longest = len(lengths), max(lengths)
    splits = -(-longest // 256)
    return {
        "q": make.normal(rows, heads, dim),
        **pool(make, kv_heads, dim, page_size, lengths, table_rows),
        "longest": longest,
        **attention_facts(make, heads, dim, window, softcap, sinks),
        "partials": make.poisoned(rows * heads * splits * (dim + 2), dtype=torch.float32),
        "counters": make.zeros(rows * kv_heads),
        "out": make.poisoned(rows, heads, dim),
    }


def paged_extend(
    make: Maker,
    heads: int,
    kv_heads: int,
    dim: int,
    queries: list[int],
    lengths: list[int],
    page_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    sinks: bool = False,
    table_rows: bool = False,
) -> Arguments:
    tokens = sum(queries)
    return {
        "q": make.normal(tokens, heads, dim),
        **pool(make, kv_heads, dim, page_size, lengths, table_rows),
        "starts": make.given([0, *accumulate(queries)], dtype=torch.int64),
        "most_queries": max(queries),
        **attention_facts(make, heads, dim, window, softcap, sinks),
        "causal": causal,
        "out": make.poisoned(tokens, heads, dim),
    }


SMALL = [
    *cases(
        paged_decode,
        ("out", "counters"),
        {"heads": 6, "kv_heads": 2, "dim": 24, "lengths": [1, 300, 70], "page_size": 16},
        {"heads": 2, "kv_heads": 1, "dim": 16, "lengths": [600, 0, 17], "page_size": 4, "table_rows": True},
        {"heads": 4, "kv_heads": 2, "dim": 16, "lengths": [530, 40], "window": 100, "softcap": 5.0, "sinks": True},
    ),
    *cases(
        paged_extend,
        ("out",),
        {"heads": 6, "kv_heads": 2, "dim": 24, "queries": [1, 50, 3], "lengths": [40, 50, 150]},
        {"heads": 1, "kv_heads": 1, "dim": 16, "queries": [140], "lengths": [400], "page_size": 4, "table_rows": True},
        {
            "heads": 2,
            "kv_heads": 1,
            "dim": 16,
            "queries": [130, 5],
            "lengths": [330, 5],
            "window": 70,
            "softcap": 5.0,
            "sinks": True,
        },
        {"heads": 2, "kv_heads": 2, "dim": 16, "queries": [70, 20], "lengths": [70, 20], "causal": False},
    ),
]
SERVED = [
    *cases(
        paged_decode,
        ("out", "counters"),
        {"heads": 14, "kv_heads": 2, "dim": 64, "lengths": [1000, 2048]},
        {"heads": 32, "kv_heads": 8, "dim": 128, "lengths": [1000, 2048]},
        {"heads": 32, "kv_heads": 8, "dim": 128, "lengths": [1000, 2048], "page_size": 64},
        {"heads": 8, "kv_heads": 4, "dim": 256, "lengths": [1000], "window": 512, "softcap": 50.0},
    ),
    *cases(
        paged_extend,
        ("out",),
        {"heads": 14, "kv_heads": 2, "dim": 64, "queries": [200, 1], "lengths": [200, 900]},
        {"heads": 32, "kv_heads": 8, "dim": 128, "queries": [200, 8], "lengths": [600, 900]},
        {"heads": 32, "kv_heads": 8, "dim": 128, "queries": [300], "lengths": [600], "window": 256, "sinks": True},
        {"heads": 8, "kv_heads": 4, "dim": 256, "queries": [200], "lengths": [600], "window": 512, "softcap": 50.0},
        {"heads": 4, "kv_heads": 1, "dim": 256, "queries": [200], "lengths": [600]},
    ),
]
