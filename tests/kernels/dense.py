"""Cases of norms, activations, dense products and rotation."""

import torch

from tests.kernels.cases import EPSILON, Arguments, Maker, cases


def rms_norm(make: Maker, rows: int, columns: int, plus_one: bool = False) -> Arguments:
    return {
        "x": make.normal(rows, columns),
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
    tiles = -(-size // 64) * -(-tokens // 64)
    return {
        "partials": make.poisoned(8 * kinds * tiles * 64 * min(64, padded), dtype=torch.float32),
        "counters": make.zeros(tiles),
    }


def rotated(make: Maker, tokens: int, heads: int, kv_heads: int, dim: int, rotary_dim: int) -> Arguments:
    """What follows the projection to queries, keys and values and their norms, in the order of the arguments."""
    cos, sin = make.normal(tokens, 1, rotary_dim // 2), make.normal(tokens, 1, rotary_dim // 2)
    pool_tokens = 3 * tokens + 2
    return {
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
) -> Arguments:
    rows = (heads + 2 * kv_heads) * dim
    return {
        "x": make.normal(tokens, hidden),
        "norm_weight": make.near_one(hidden) if norm else None,
        "epsilon": EPSILON,
        "plus_one": plus_one,
        "weight": make.weight(rows, hidden),
        "bias": make.normal(rows) if bias else None,
        **rotated(make, tokens, heads, kv_heads, dim, dim),
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
        "query_norm": make.near_one(dim) if head_norms else None,
        "key_norm": make.near_one(dim) if head_norms else None,
        **rotated(make, tokens, heads, kv_heads, dim, rotary_dim or dim),
    }


SMALL = [
    *cases(
        rms_norm,
        ("out",),
        {"rows": 3, "columns": 96},
        {"rows": 2, "columns": 64, "plus_one": True},
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
        {"tokens": 70, "columns": 300, "rows": 70},
    ),
    *cases(
        skinny_gated,
        ("out", "counters"),
        {"tokens": 5, "columns": 300, "size": 70},
        {"tokens": 70, "columns": 300, "size": 20},
        {"tokens": 17, "columns": 40, "size": 30, "bias": True, "activation": "gelu"},
    ),
    *cases(
        norm_qkv_rope_kv,
        ("q", "k_pool", "v_pool"),
        {"tokens": 1, "hidden": 48, "heads": 4, "kv_heads": 2, "dim": 24, "bias": True},
        {"tokens": 3, "hidden": 80, "heads": 2, "kv_heads": 1, "dim": 32, "plus_one": True},
        {"tokens": 2, "hidden": 48, "heads": 2, "kv_heads": 1, "dim": 16, "norm": False},
    ),
    *cases(
        rope_kv,
        ("q", "k_pool", "v_pool"),
        {"tokens": 3, "heads": 6, "kv_heads": 2, "dim": 24},
        {"tokens": 2, "heads": 2, "kv_heads": 2, "dim": 16, "rotary_dim": 8, "head_norms": True},
        {"tokens": 2, "heads": 2, "kv_heads": 1, "dim": 16, "head_norms": True, "plus_one": True},
    ),
]
SERVED = [
    *cases(
        rms_norm,
        ("out",),
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
        {"tokens": 2, "hidden": 2048, "heads": 32, "kv_heads": 8, "dim": 64},
        {"tokens": 4, "hidden": 4096, "heads": 32, "kv_heads": 8, "dim": 128},
    ),
    *cases(
        rope_kv,
        ("q", "k_pool", "v_pool"),
        {"tokens": 64, "heads": 14, "kv_heads": 2, "dim": 64},
        {"tokens": 64, "heads": 16, "kv_heads": 8, "dim": 128, "head_norms": True},
    ),
]
