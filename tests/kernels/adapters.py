"""Cases of what LoRA adapters add to products."""

import torch

from quartet.kernels.reference.adapters import tiles_of
from tests.kernels.cases import Arguments, Maker, cases

SPARE_TILES = 2  # without tokens


def grouped(make: Maker, owners: list[int]) -> Arguments:
    tiles, order = tiles_of(owners)
    tiles += [[0, 0, 0]] * SPARE_TILES
    return {"tiles": make.given(tiles), "order": make.given(order or [0])}


def adapter_shrink(make: Maker, owners: list[int], slots: int, ranks: int, columns: int) -> Arguments:
    return {
        "x": make.normal(len(owners), columns),
        "a": torch.stack([make.weight(ranks, columns) for _ in range(slots)]),
        **grouped(make, owners),
        "out": make.zeros(len(owners), ranks, dtype=make.dtype),
    }


def adapter_expand(
    make: Maker, owners: list[int], slots: int, rank: int, columns: int, first: int = 0, column: int = 0, width: int = 0
) -> Arguments:
    return {
        "x": make.normal(len(owners), first + rank + 3),
        "first": first,
        "b": torch.stack([make.weight(columns, rank) for _ in range(slots)]),
        **grouped(make, owners),
        "out": make.normal(len(owners), width or column + columns),
        "column": column,
    }


MIXED = [0, -1, 2, 0, 1, 2, 2, -1]
LONG = [1] * 37 + [0] * 5 + [-1]
SMALL = [
    *cases(
        adapter_shrink,
        ("out",),
        {"owners": MIXED, "slots": 3, "ranks": 20, "columns": 300},
        {"owners": LONG, "slots": 2, "ranks": 4, "columns": 48},
        {"owners": [-1], "slots": 1, "ranks": 16, "columns": 64},
    ),
    *cases(
        adapter_expand,
        ("out",),
        {"owners": MIXED, "slots": 3, "rank": 5, "columns": 70, "first": 8, "column": 9, "width": 90},
        {"owners": LONG, "slots": 2, "rank": 80, "columns": 30},
        {"owners": [-1], "slots": 1, "rank": 16, "columns": 64},
    ),
]
STEP = [0, 1, 2, 3] * 4
SERVED = [
    *cases(
        adapter_shrink,
        ("out",),
        {"owners": STEP, "slots": 8, "ranks": 48, "columns": 896},
        {"owners": STEP, "slots": 8, "ranks": 64, "columns": 14336},
    ),
    *cases(
        adapter_expand,
        ("out",),
        {"owners": STEP, "slots": 8, "rank": 16, "columns": 4864, "first": 16, "column": 4864},
        {"owners": STEP, "slots": 8, "rank": 64, "columns": 14336},
    ),
]
