"""Cases of recurrent layers in decode steps."""

import torch

from tests.kernels.cases import Arguments, Maker, cases


def pool(make: Maker, rows: int, *shape: int, dtype: torch.dtype | None = None) -> Arguments:
    """States of some sequences, each of which has two rows, in no order."""
    order = [2 * row + 1 for row in reversed(range(rows))]
    return {
        "reads": make.given(order, dtype=torch.int64),
        "writes": make.given([row + 1 for row in order], dtype=torch.int64),
        "states": make.normal(2 * rows + 2, *shape, dtype=dtype),
    }


def forgotten(make: Maker, *shape: int) -> torch.Tensor:
    """Decays: below zero."""
    x = make.normal(*shape, dtype=torch.float32)
    return x if make.device == "meta" else -x.abs()


def convolve_row(
    make: Maker, rows: int, channels: int, taps: int = 4, bias: bool = False, activates: bool = True
) -> Arguments:
    return {
        "x": make.normal(rows, channels + 8)[:, 4:-4],
        "weight": make.weight(channels, taps),
        "bias": make.normal(channels) if bias else None,
        "activates": activates,
        **pool(make, rows, taps - 1, channels),
        "out": make.poisoned(rows, channels),
    }


def delta_update(
    make: Maker, rows: int, heads: int, key_heads: int, key_dim: int, value_dim: int, by_channel: bool = False
) -> Arguments:
    beta = make.normal(rows, heads, dtype=torch.float32)
    return {
        "mixed": make.normal(rows, 2 * key_heads * key_dim + heads * value_dim),
        "decay": forgotten(make, rows, heads * (key_dim if by_channel else 1)),
        "beta": beta if make.device == "meta" else beta.sigmoid(),
        **pool(make, rows, heads, key_dim, value_dim, dtype=torch.float32),
        "out": make.poisoned(rows, heads * value_dim),
    }


def space_update(make: Maker, rows: int, heads: int, groups: int, key_dim: int, value_dim: int) -> Arguments:
    steps = make.normal(rows, heads, dtype=torch.float32)
    return {
        "mixed": make.normal(rows, 2 * groups * key_dim + heads * value_dim),
        "decay": forgotten(make, rows, heads),
        "steps": steps if make.device == "meta" else steps.abs(),
        "skip": make.near_one(heads),
        **pool(make, rows, heads, key_dim, value_dim, dtype=torch.float32),
        "out": make.poisoned(rows, heads * value_dim, dtype=torch.float32),
    }


SMALL = [
    *cases(
        convolve_row,
        ("out", "states"),
        {"rows": 3, "channels": 70},
        {"rows": 2, "channels": 520, "taps": 3, "bias": True, "activates": False},
        {"rows": 1, "channels": 16, "taps": 2},
    ),
    *cases(
        delta_update,
        ("out", "states"),
        {"rows": 3, "heads": 4, "key_heads": 2, "key_dim": 16, "value_dim": 8},
        {"rows": 2, "heads": 2, "key_heads": 2, "key_dim": 24, "value_dim": 40, "by_channel": True},
    ),
    *cases(
        space_update,
        ("out", "states"),
        {"rows": 3, "heads": 4, "groups": 2, "key_dim": 16, "value_dim": 8},
        {"rows": 2, "heads": 3, "groups": 1, "key_dim": 24, "value_dim": 40},
    ),
]
SERVED = [
    *cases(
        convolve_row,
        ("out", "states"),
        {"rows": 64, "channels": 2048, "taps": 3, "activates": False},
        {"rows": 64, "channels": 8192},
    ),
    *cases(
        delta_update,
        ("out", "states"),
        {"rows": 64, "heads": 32, "key_heads": 16, "key_dim": 128, "value_dim": 128},
        {"rows": 64, "heads": 32, "key_heads": 32, "key_dim": 128, "value_dim": 128, "by_channel": True},
    ),
    *cases(
        space_update,
        ("out", "states"),
        {"rows": 64, "heads": 24, "groups": 1, "key_dim": 256, "value_dim": 64},
        {"rows": 64, "heads": 128, "groups": 8, "key_dim": 128, "value_dim": 64},
    ),
]
