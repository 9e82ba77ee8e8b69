"""A layer's mixture of experts on fused operations.

For a few tokens each chosen expert's rows are read straight from its weights. For more, (token, expert) pairs are
grouped by expert first. Neither waits to learn how many tokens an expert got, so both can be recorded.
"""

from collections.abc import Callable

import torch

from kernels.configs import EXPERT_BLOCKS, STEADY_EXPERT_BLOCK
from kernels.ops import Ops
from scheduler_service.model.layers import Norm
from scheduler_service.model.moe import Moe
from scheduler_service.model.products import Products

DIRECT_PAIRS = 64  # (token, expert) pairs up to which nothing is grouped
Record = Callable[[torch.Tensor], None]


class FusedMoe:
    """Adds what the experts say of norm(residual) to the residual stream."""

    def __init__(self, moe: Moe, norm: Norm, plus_one: bool, activation: str, products: Products) -> None:
        self.moe = moe
        self.norm = norm
        self.plus_one = plus_one
        self.activation = activation
        self.products = products
        self.ops: Ops = products.ops
        self.experts, self.top_k = moe.moe.experts, moe.moe.top_k
        self.gate_up = whole([linear.weight for linear in moe.gate_up])  # (experts, 2 * size, hidden)
        self.down = whole([linear.weight for linear in moe.down])  # (experts, hidden, size)
        self.shared_gate = moe.shared_gate.weight if moe.shared is not None else None
        products.reserve(moe.router)
        products.workspace.reserve(DIRECT_PAIRS)
        if moe.shared is not None:
            products.reserve(moe.shared.gate_up, gated=True)
            products.reserve(moe.shared.down)
            products.reserve(moe.shared_gate)

    def __call__(self, residual: torch.Tensor, record: Record | None) -> None:
        if residual.shape[0] * self.top_k <= DIRECT_PAIRS and not self.products.steady:
            ids = self.add_directly(residual)
        else:
            ids = self.add_grouped(residual)
        if record:
            record(ids)

    def add_directly(self, residual: torch.Tensor) -> torch.Tensor:
        """For a few tokens; returns the chosen experts (tokens, top_k)."""
        norm = self.norm.weight, self.norm.epsilon, self.plus_one
        shared = self.moe.shared
        extra = 0 if shared is None else 1
        tokens, size = len(residual), self.down.shape[2]
        logits = residual.new_empty(tokens, self.experts + extra, dtype=torch.float32)
        ids, weights = self.choice(residual, extra)
        self.ops.router(
            residual,
            *norm,
            self.moe.router.weight,
            self.shared_gate,
            self.moe.moe.renormalize,
            logits,
            self.products.workspace.counters,
            None,
            None,
            ids,
            weights,
        )
        shared_size = 0 if shared is None else len(shared.gate_up.weight) // 2
        inner = residual.new_empty(tokens, self.top_k * size + shared_size)
        shared_gate_up, shared_down = (None, None) if shared is None else (shared.gate_up.weight, shared.down.weight)
        self.ops.expert_gate_up(residual, *norm, ids, self.gate_up, shared_gate_up, self.activation, inner)
        self.ops.expert_down(inner, ids, weights, self.down, shared_down, residual, residual)
        return ids

    def add_grouped(self, residual: torch.Tensor) -> torch.Tensor:
        """For more tokens; returns the chosen experts (tokens, top_k)."""
        x = torch.empty_like(residual)
        self.ops.add_rms_norm(residual, None, self.norm.weight, self.norm.epsilon, self.plus_one, x)
        logits = x.new_empty(len(x), self.experts, dtype=torch.float32)
        self.products.write(x, self.moe.router, logits)
        ids, weights = self.choice(x, 0)
        self.ops.choose_experts(logits, self.moe.moe.renormalize, None, None, ids, weights)
        total = ids.numel()
        block = STEADY_EXPERT_BLOCK if self.products.steady else block_size(total, self.experts)
        blocks = min(total, total // block + self.experts)  # enough, however the pairs are spread
        pairs = torch.empty(blocks * block, dtype=torch.int32, device=x.device)
        block_experts = torch.empty(blocks, dtype=torch.int32, device=x.device)
        self.ops.align_experts(ids, self.experts, block, pairs, block_experts)
        inner = x.new_empty(total, self.down.shape[2])
        self.ops.expert_gemm(x, pairs, block_experts, block, self.gate_up, self.activation, inner)
        y = x.new_empty(total, x.shape[1])
        self.ops.expert_gemm(inner, pairs, block_experts, block, self.down, None, y)
        self.ops.expert_sum(y, weights, *self.shared(x), residual, residual)
        return ids

    def choice(self, x: torch.Tensor, extra: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for chosen experts and their weights."""
        ids = torch.empty(len(x), self.top_k, dtype=torch.int32, device=x.device)
        return ids, x.new_empty(len(x), self.top_k + extra, dtype=torch.float32)

    def shared(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the expert of all tokens says, and the logit of its gate (tokens, 1)."""
        shared = self.moe.shared
        if shared is None:
            return None, None
        inner = self.products.gated(x, shared.gate_up, self.activation)
        return self.products(inner, shared.down), self.products(x, self.moe.shared_gate)


def block_size(pairs: int, experts: int) -> int:
    """Pairs of one program: about what an expert gets."""
    return next((block for block in EXPERT_BLOCKS if pairs <= block * experts), EXPERT_BLOCKS[-1])


def whole(parts: list[torch.Tensor]) -> torch.Tensor:
    """Neighbouring slabs of one buffer as one tensor that shares their memory."""
    first = parts[0]
    step = first.numel()
    assert all(part.data_ptr() == first.data_ptr() + i * step * first.element_size() for i, part in enumerate(parts))
    return first.as_strided((len(parts), *first.shape), (step, *first.stride()))
