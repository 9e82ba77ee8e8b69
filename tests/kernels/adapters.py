"""Cases of what LoRA adapters add to products."""

import torch

from quartet.kernels.reference.adapters import tiles_of
from tests.kernels.cases import Arguments, Maker, cases

SPARE_TILES = 2  # without tokens


OWNERS = {  # the slot of each token, or -1
    "mixed": [0, -1, 2, 0, 1, 2, 2, -1],
    "long": [1] * 37 + [0] * 5 + [-1],
    "none": [-1],
    "step": [0, 1, 2, 3] * 4,
}


def grouped(make: Maker, owners: list[int], rank: int, lowest: int) -> Arguments:
    """Tiles of tokens whose adapters have ranks between `lowest` and `rank`."""
    ranks = [max(lowest, rank - slot) for slot in range(max(owners) + 1)]
    tiles, order = tiles_of([(slot, token, token + 1) for token, slot in enumerate(owners) if slot >= 0], ranks)
    tiles += [[0, 0, 0, 0]] * SPARE_TILES
    return {"tiles": make.given(tiles), "order": make.given(order or [0])}


def adapter_shrink(
    make: Maker, owners: str, slots: int, rank: int, columns: int, parts: int = 1, lowest: int = 1, shared: int = 1
) -> Arguments:
    """`shared`: so many tokens have one row of x."""
    factors = [make.weight(parts * rank, columns).view(parts, rank, columns) for _ in range(slots)]
    return {
        "x": make.normal(len(OWNERS[owners]) // shared, columns),
        "a": torch.stack(factors),
        **grouped(make, OWNERS[owners], rank, lowest),
        "out": make.zeros(len(OWNERS[owners]), parts * rank, dtype=make.dtype),
    }


def adapter_expand(
    make: Maker,
    owners: str,
    slots: int,
    rank: int,
    columns: int,
    first: int = 0,
    column: int = 0,
    width: int = 0,
    lowest: int = 1,
) -> Arguments:
    return {
        "x": make.normal(len(OWNERS[owners]), first + rank + 3),
        "first": first,
        "b": torch.stack([make.weight(columns, rank) for _ in range(slots)]),
        **grouped(make, OWNERS[owners], rank, lowest),
        "out": make.normal(len(OWNERS[owners]), width or column + columns),
        "column": column,
    }


SMALL = [
    *cases(
        adapter_shrink,
        ("out",),
        {"owners": "mixed", "slots": 3, "rank": 20, "columns": 300},
        {"owners": "mixed", "slots": 3, "rank": 16, "columns": 40, "parts": 3, "lowest": 15},
        {"owners": "mixed", "slots": 3, "rank": 5, "columns": 40, "parts": 2, "shared": 2},
        {"owners": "long", "slots": 2, "rank": 32, "columns": 48, "lowest": 31},
        {"owners": "none", "slots": 1, "rank": 16, "columns": 64},
    ),
    *cases(
        adapter_expand,
        ("out",),
        {"owners": "mixed", "slots": 3, "rank": 5, "columns": 70, "first": 8, "column": 9, "width": 90},
        {"owners": "long", "slots": 2, "rank": 80, "columns": 30},
        {"owners": "none", "slots": 1, "rank": 16, "columns": 64},
    ),
]
SERVED = [
    *cases(
        adapter_shrink,
        ("out",),
        {"owners": "step", "slots": 8, "rank": 16, "columns": 896, "parts": 3},
        {"owners": "step", "slots": 8, "rank": 64, "columns": 14336},
    ),
    *cases(
        adapter_expand,
        ("out",),
        {"owners": "step", "slots": 8, "rank": 16, "columns": 4864, "first": 16, "column": 4864},
        {"owners": "step", "slots": 8, "rank": 64, "columns": 14336},
    ),
]
