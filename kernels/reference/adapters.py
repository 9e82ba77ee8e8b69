"""What LoRA adapters add to products, in plain torch."""

from collections.abc import Iterator

import torch

TILE_TOKENS = 16  # of one adapter, which are computed together


def tiles_of(owners: list[int]) -> tuple[list[list[int]], list[int]]:
    """Tokens grouped by adapter: (slot, begin, count) of each tile, and the tokens in their order.

    owners: each token's slot, or -1.
    """
    order = sorted((token for token, slot in enumerate(owners) if slot >= 0), key=lambda token: owners[token])
    tiles: list[list[int]] = []
    for place, token in enumerate(order):
        if not tiles or tiles[-1][0] != owners[token] or tiles[-1][2] == TILE_TOKENS:
            tiles.append([owners[token], place, 0])
        tiles[-1][2] += 1
    return tiles, order


def groups(tiles: torch.Tensor, order: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The slot and the tokens of each tile."""
    for slot, begin, count in tiles.tolist():
        yield slot, order[begin : begin + count].long()


def adapter_shrink(
    x: torch.Tensor, a: torch.Tensor, tiles: torch.Tensor, order: torch.Tensor, out: torch.Tensor
) -> None:
    """See kernels.operations.Ops.adapter_shrink."""
    for slot, tokens in groups(tiles, order):
        out[tokens] = (x[tokens].float() @ a[slot].float().T).to(out.dtype)


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
    columns, rank = b.shape[1:]
    for slot, tokens in groups(tiles, order):
        added = x[tokens, first : first + rank].float() @ b[slot].float().T
        part = out[tokens, column : column + columns].float() + added
        out[tokens, column : column + columns] = part.to(out.dtype)
