"""One table of cases for three suites: Triton's interpreter, the compiler for sm_90, a GPU.

A case makes the arguments of one operation for a shape, a dtype and a device. The interpreter and the GPU compare the
Triton kernel with the torch operation of the same name on them; the compiler takes them from the "meta" device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from math import nan
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes tensors of one dtype on one device, the same values each time."""

    dtype: torch.dtype
    device: str
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype).to(self.device)

    def weight(self, *shape: int) -> torch.Tensor:
        """Rows whose products with unit normal inputs are unit normal again."""
        return self.normal(*shape, scale=shape[-1] ** -0.5)

    def near_one(self, *shape: int) -> torch.Tensor:
        return self.normal(*shape, scale=0.1) if self.device == "meta" else 1 + self.normal(*shape, scale=0.1)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def given(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output that shows what was not written."""
        dtype = dtype or self.dtype
        return torch.full(shape, nan if dtype.is_floating_point else -7, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape."""

    op: str
    make: Callable[..., Arguments]
    shape: dict[str, Any]
    outputs: tuple[str, ...] = ("out",)

    @property
    def name(self) -> str:
        return "-".join([self.op, *(f"{key}={value}" for key, value in self.shape.items())])

    def arguments(self, dtype: torch.dtype, device: str) -> Arguments:
        return self.make(Maker(dtype, device), **self.shape)


EPSILON = 1e-6


def add_rms_norm(make: Maker, rows: int, columns: int, residual: bool = True, plus_one: bool = False) -> Arguments:
    return {
        "x": make.normal(rows, columns),
        "residual": make.normal(rows, columns) if residual else None,
        "weight": make.near_one(columns),
        "epsilon": EPSILON,
        "plus_one": plus_one,
        "out": make.poisoned(rows, columns),
    }


def gated_activation(make: Maker, rows: int, size: int, activation: str = "silu") -> Arguments:
    return {"gate_up": make.normal(rows, 2 * size), "activation": activation, "out": make.poisoned(rows, size)}


def gemv(make: Maker, tokens: int, columns: int, rows: int, bias: bool = False, residual: bool = True) -> Arguments:
    return {
        "x": make.normal(tokens, columns),
        "weight": make.weight(rows, columns),
        "bias": make.normal(rows) if bias else None,
        "residual": make.normal(tokens, rows) if residual else None,
        "out": make.poisoned(tokens, rows),
    }


def norm_gate_up(
    make: Maker,
    tokens: int,
    columns: int,
    size: int,
    norm: bool = True,
    plus_one: bool = False,
    bias: bool = False,
    activation: str = "silu",
) -> Arguments:
    return {
        "x": make.normal(tokens, columns),
        "norm_weight": make.near_one(columns) if norm else None,
        "epsilon": EPSILON,
        "plus_one": plus_one,
        "weight": make.weight(2 * size, columns),
        "bias": make.normal(2 * size) if bias else None,
        "activation": activation,
        "out": make.poisoned(tokens, size),
    }


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


def rotated(make: Maker, tokens: int, heads: int, kv_heads: int, dim: int, rotary_dim: int, norms: bool) -> Arguments:
    """What follows the projection to queries, keys and values, in the order of the arguments."""
    cos, sin = make.normal(tokens, 1, rotary_dim // 2), make.normal(tokens, 1, rotary_dim // 2)
    pool_tokens = 3 * tokens + 2
    return {
        "query_norm": make.near_one(dim) if norms else None,
        "key_norm": make.near_one(dim) if norms else None,
        "cos": torch.cat((cos, cos), 2),
        "sin": torch.cat((-sin, sin), 2),
        "slots": make.given(list(range(1, 3 * tokens, 3))[::-1], dtype=torch.int64),
        "k_pool": make.normal(kv_heads, pool_tokens, dim),
        "v_pool": make.normal(kv_heads, pool_tokens, dim),
        "q": make.poisoned(tokens, heads, dim),
    }


def norm_qkv_rope_kv(
    make: Maker,
    tokens: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    dim: int,
    norm: bool = True,
    plus_one: bool = False,
    bias: bool = False,
    head_norms: bool = False,
) -> Arguments:
    rows = (heads + 2 * kv_heads) * dim
    return {
        "x": make.normal(tokens, hidden),
        "norm_weight": make.near_one(hidden) if norm else None,
        "epsilon": EPSILON,
        "plus_one": plus_one,
        "weight": make.weight(rows, hidden),
        "bias": make.normal(rows) if bias else None,
        **rotated(make, tokens, heads, kv_heads, dim, dim, head_norms),
    }


def rope_kv(
    make: Maker,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int | None = None,
    plus_one: bool = False,
    head_norms: bool = False,
) -> Arguments:
    return {
        "qkv": make.normal(tokens, (heads + 2 * kv_heads) * dim),
        "epsilon": EPSILON,
        "plus_one": plus_one,
        **rotated(make, tokens, heads, kv_heads, dim, rotary_dim or dim, head_norms),
    }


def skinny(make: Maker, tokens: int, columns: int, rows: int, bias: bool = False, residual: bool = True) -> Arguments:
    arguments = gemv(make, tokens, columns, rows, bias, residual)
    return {**arguments, **split_sums(make, tokens, rows, kinds=1)}


def skinny_gated(
    make: Maker, tokens: int, columns: int, size: int, bias: bool = False, activation: str = "silu"
) -> Arguments:
    return {
        "x": make.normal(tokens, columns),
        "weight": make.weight(2 * size, columns),
        "bias": make.normal(2 * size) if bias else None,
        "activation": activation,
        **split_sums(make, tokens, size, kinds=2),
        "out": make.poisoned(tokens, size),
    }


def split_sums(make: Maker, tokens: int, size: int, kinds: int) -> Arguments:
    """Room for the parts of eight splits at most."""
    padded = max(16, 1 << (tokens - 1).bit_length())
    tiles = -(-size // 64)
    return {
        "partials": make.poisoned(8 * kinds * tiles * 64 * padded, dtype=torch.float32),
        "counters": make.zeros(tiles),
    }


def cases(op: Callable[..., Arguments], outputs: tuple[str, ...], *shapes: dict[str, Any]) -> list[Case]:
    return [Case(op.__name__, op, shape, outputs) for shape in shapes]


# Small enough for the interpreter, odd enough to meet every mask.
SMALL = [
    *cases(
        add_rms_norm,
        ("out", "residual"),
        {"rows": 3, "columns": 96},
        {"rows": 2, "columns": 64, "residual": False, "plus_one": True},
    ),
    *cases(
        gated_activation,
        ("out",),
        {"rows": 2, "size": 72},
        {"rows": 2, "size": 72, "activation": "gelu"},
        {"rows": 2, "size": 72, "activation": "gelu_tanh"},
    ),
    *cases(
        gemv,
        ("out",),
        {"tokens": 1, "columns": 100, "rows": 10},
        {"tokens": 3, "columns": 1500, "rows": 9, "bias": True, "residual": False},
    ),
    *cases(
        norm_gate_up,
        ("out",),
        {"tokens": 1, "columns": 100, "size": 12},
        {"tokens": 3, "columns": 1500, "size": 10, "bias": True, "plus_one": True, "activation": "gelu_tanh"},
        {"tokens": 2, "columns": 40, "size": 10, "norm": False, "activation": "gelu"},
    ),
    *cases(
        skinny,
        ("out", "counters"),
        {"tokens": 5, "columns": 300, "rows": 70},
        {"tokens": 20, "columns": 100, "rows": 40, "bias": True, "residual": False},
    ),
    *cases(
        skinny_gated,
        ("out", "counters"),
        {"tokens": 5, "columns": 300, "size": 70},
        {"tokens": 17, "columns": 40, "size": 30, "bias": True, "activation": "gelu"},
    ),
    *cases(
        norm_qkv_rope_kv,
        ("q", "k_pool", "v_pool"),
        {"tokens": 1, "hidden": 48, "heads": 4, "kv_heads": 2, "dim": 24, "bias": True},
        {"tokens": 3, "hidden": 80, "heads": 2, "kv_heads": 1, "dim": 32, "head_norms": True, "plus_one": True},
        {"tokens": 2, "hidden": 48, "heads": 2, "kv_heads": 1, "dim": 16, "norm": False},
    ),
    *cases(
        rope_kv,
        ("q", "k_pool", "v_pool"),
        {"tokens": 3, "heads": 6, "kv_heads": 2, "dim": 24},
        {"tokens": 2, "heads": 2, "kv_heads": 2, "dim": 16, "rotary_dim": 8, "head_norms": True},
        {"tokens": 2, "heads": 2, "kv_heads": 1, "dim": 16, "head_norms": True, "plus_one": True},
    ),
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
# Shapes of models that are served: Qwen2.5-0.5B, Llama-3.1-8B, Qwen1.5-MoE-A2.7B.
SERVED = [
    *cases(
        add_rms_norm,
        ("out", "residual"),
        {"rows": 64, "columns": 896},
        {"rows": 64, "columns": 4096},
    ),
    *cases(gated_activation, ("out",), {"rows": 128, "size": 4864}),
    *cases(
        gemv,
        ("out",),
        {"tokens": 1, "columns": 896, "rows": 896},
        {"tokens": 1, "columns": 4864, "rows": 896},
        {"tokens": 1, "columns": 14336, "rows": 4096},
        {"tokens": 4, "columns": 896, "rows": 896},
    ),
    *cases(
        norm_gate_up,
        ("out",),
        {"tokens": 1, "columns": 896, "size": 4864},
        {"tokens": 1, "columns": 4096, "size": 14336},
        {"tokens": 4, "columns": 4096, "size": 14336},
    ),
    *cases(
        skinny,
        ("out", "counters"),
        {"tokens": 8, "columns": 896, "rows": 896},
        {"tokens": 16, "columns": 14336, "rows": 4096},
        {"tokens": 64, "columns": 14336, "rows": 4096},
    ),
    *cases(
        skinny_gated,
        ("out", "counters"),
        {"tokens": 8, "columns": 896, "size": 4864},
        {"tokens": 64, "columns": 4096, "size": 14336},
    ),
    *cases(
        norm_qkv_rope_kv,
        ("q", "k_pool", "v_pool"),
        {"tokens": 1, "hidden": 896, "heads": 14, "kv_heads": 2, "dim": 64, "bias": True},
        {"tokens": 1, "hidden": 4096, "heads": 32, "kv_heads": 8, "dim": 128},
        {"tokens": 1, "hidden": 1024, "heads": 16, "kv_heads": 8, "dim": 128, "head_norms": True},
        {"tokens": 4, "hidden": 4096, "heads": 32, "kv_heads": 8, "dim": 128},
    ),
    *cases(
        rope_kv,
        ("q", "k_pool", "v_pool"),
        {"tokens": 64, "heads": 14, "kv_heads": 2, "dim": 64},
        {"tokens": 64, "heads": 16, "kv_heads": 8, "dim": 128, "head_norms": True},
    ),
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
    ),
]


def case_id(case: Case) -> str:
    return case.name


def clone(arguments: Arguments) -> Arguments:
    return {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}


def assert_agree(case: Case, left: Any, right: Any, dtype: torch.dtype, device: str, tolerance: float) -> None:
    """Both implementations make the same outputs of the same arguments."""
    arguments = case.arguments(dtype, device)
    expected, found = clone(arguments), clone(arguments)
    getattr(left, case.op)(**expected)
    getattr(right, case.op)(**found)
    for output in case.outputs:
        if found[output] is None:
            continue
        torch.testing.assert_close(
            found[output], expected[output], rtol=tolerance, atol=tolerance, msg=f"{output}: {{}}".format
        )
