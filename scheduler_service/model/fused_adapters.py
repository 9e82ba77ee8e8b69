"""What LoRA adapters add to products on fused operations: a shrink and an expand behind the product.

Which tokens have which adapter is read on the device, so that a recorded step serves any of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.operations import Ops
from quartet.kernels.reference.adapters import TILE_TOKENS
from quartet.scheduler_service.model.adapter_pool import AdaptedProduct, AdapterPool


@dataclass(frozen=True, slots=True)
class StepTiles:
    """The tokens of a step by adapter, see kernels.operations.Ops.adapter_shrink."""

    tiles: torch.Tensor  # (tiles, 4) int32
    order: torch.Tensor  # (tokens,) int32
    owners: torch.Tensor  # (tokens,) int32: slot of each token's adapter, or -1
    ranks: torch.Tensor  # (slots,) int32: of the adapters


class FusedAdapters:
    """The adapters of the step that is computed; none between steps."""

    def __init__(self, ops: Ops, pool: AdapterPool) -> None:
        self.ops = ops
        self.pool = pool
        self.step: StepTiles | None = None

    @contextmanager
    def of_step(self, step: StepTiles) -> Iterator[None]:
        """Within it `add` adds what these tokens' adapters have."""
        self.step = step
        try:
            yield
        finally:
            self.step = None

    def add(self, x: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
        """out (tokens, out) += what the tokens' adapters have for a layer's weight; x (tokens, in)."""
        product = self.pool.products.get(linear)
        if self.step is not None and product is not None:
            self.add_product(x, product, self.step.tiles, self.step.order, out)

    def add_product(
        self, x: torch.Tensor, product: AdaptedProduct, tiles: torch.Tensor, order: torch.Tensor, out: torch.Tensor
    ) -> None:
        """out += b @ a @ x for the rows of `order`, as Ops.adapter_shrink has them."""
        inner = x.new_empty(len(out), product.ranks)
        self.ops.adapter_shrink(x, product.a, tiles, order, inner)
        for part in product.parts:
            self.ops.adapter_expand(inner, part.first, part.b, tiles, order, out, part.column)

    def of_experts(self, ids: torch.Tensor, experts: int) -> "ExpertTiles | None":
        """Where the (token, expert) pairs of a mixture have adapters; ids (tokens, top_k) int32."""
        if self.step is None:
            return None
        step, groups, total = self.step, self.pool.slots * experts, ids.numel()
        blocks = min(total, total // TILE_TOKENS + groups)
        pairs = torch.empty(blocks * TILE_TOKENS, dtype=torch.int32, device=ids.device)
        group = torch.empty(blocks, dtype=torch.int32, device=ids.device)
        owners = step.owners[:, None]
        wanted = torch.where(owners >= 0, owners * experts + ids, groups)  # `groups` itself belongs to none
        self.ops.align_experts(wanted, groups, TILE_TOKENS, pairs, group)
        used = group >= 0
        group.clamp_(min=0)
        counts = (pairs.view(blocks, TILE_TOKENS) < total).sum(1, dtype=torch.int32) * used
        begins = torch.arange(0, len(pairs), TILE_TOKENS, dtype=torch.int32, device=ids.device)
        ranks = step.ranks.index_select(0, group // experts)
        return ExpertTiles(self, torch.stack((group, begins, counts, ranks), 1), pairs)


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """The pairs of one mixture by adapter and expert."""

    adapters: FusedAdapters
    tiles: torch.Tensor
    order: torch.Tensor

    def add(self, x: torch.Tensor, linears: list[Linear], out: torch.Tensor) -> None:
        """out (pairs, out) += what the pairs' adapters have for their experts; x (pairs or tokens, in)."""
        product = self.adapters.pool.products.get(linears[0])
        if product is not None:
            self.adapters.add_product(x, product, self.tiles, self.order, out)
