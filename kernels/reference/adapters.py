"""What LoRA adapters add to products, in plain torch."""

from collections.abc import Iterable, Iterator, Sequence

import torch

TILE_TOKENS = 16  # of one adapter, which are computed together


Run = tuple[int, int, int]  # an adapter's slot, and from which token on to which one its tokens stand


def tiles_of(runs: Iterable[Run], ranks: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Tokens grouped by adapter: (slot, begin, count, rank) of each tile, and the tokens in their order.

    ranks: by slot.
    """
    by_slot: dict[int, list[range]] = {}
    for slot, begin, end in runs:
        by_slot.setdefault(slot, []).append(range(begin, end))
    tiles: list[list[int]] = []
    order: list[int] = []
    for slot, tokens in sorted(by_slot.items()):
        first = len(order)
        for some in tokens:
            order.extend(some)
        places = range(first, len(order), TILE_TOKENS)
        tiles += [[slot, place, min(TILE_TOKENS, len(order) - place), ranks[slot]] for place in places]
    return tiles, order


def most_tiles(tokens: int, slots: int) -> int:
    """How many tiles so many tokens can have: of each adapter one may be filled in part."""
    return min(tokens, tokens // TILE_TOKENS + slots)


def groups(tiles: torch.Tensor, order: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, int]]:
    """The slot, the tokens and the rank of each tile."""
    for slot, begin, count, rank in tiles.tolist():
        if count:
            yield slot, order[begin : begin + count].long(), rank


def adapter_shrink(
    x: torch.Tensor, a: torch.Tensor, tiles: torch.Tensor, order: torch.Tensor, out: torch.Tensor
) -> None:
    """See kernels.operations.Ops.adapter_shrink."""
    shared = len(out) // len(x)
    for slot, tokens, own in groups(tiles, order):
        for part, factor in enumerate(a[slot]):  # (rank, in)
            first = part * len(factor)
            out[tokens, first : first + own] = (x[tokens // shared].float() @ factor[:own].float().T).to(out.dtype)


def adapter_expand(
    x: torch.Tensor,
    first: int,
    b: torch.Tensor,
    tiles: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    column: int,
) -> None:
    """See kernels.operations.Ops.adapter_expand."""
    columns = b.shape[1]
    for slot, tokens, own in groups(tiles, order):
        added = x[tokens, first : first + own].float() @ b[slot, :, :own].float().T
        part = out[tokens, column : column + columns].float() + added
        out[tokens, column : column + columns] = part.to(out.dtype)
