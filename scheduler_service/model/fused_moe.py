"""A layer's mixture of experts on fused operations.

For a few tokens each chosen expert's rows are read straight from its weights. For more, (token, expert) pairs are
grouped by expert first. Neither waits to learn how many tokens an expert got, so both can be recorded.
"""

import torch

from quartet.kernels.reference.layers import choose_scored_experts
from quartet.kernels.triton.configs import EXPERT_BLOCKS, STEADY_EXPERT_BLOCK
from quartet.scheduler_service.model.layers import Moe, Norm
from quartet.scheduler_service.model.products import Products

DIRECT_PAIRS = 64  # (token, expert) pairs up to which nothing is grouped
Choice = tuple[torch.Tensor, torch.Tensor]  # ids (tokens, top_k) int32 of experts, their weights in float32


class FusedMoe:
    """Adds moe(norm(residual)) to the residual stream."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self.ops = products.ops

    def reserve(self, moe: Moe) -> None:
        """Have room for the products of this mixture."""
        self.products.reserve(moe.router)
        self.products.workspace.reserve(DIRECT_PAIRS)
        if moe.shared is not None:
            self.products.reserve(moe.shared.gate_up, gated=True)
            self.products.reserve(moe.shared.down)
        if moe.shared_gate is not None:
            self.products.reserve(moe.shared_gate)

    def add(self, residual: torch.Tensor, norm: Norm, moe: Moe, activation: str) -> torch.Tensor:
        """residual += moe(norm(residual)), in place; returns the chosen experts (tokens, top_k)."""
        separate = self.products.steady or self.products.adds_adapters
        directly = residual.shape[0] * moe.spec.top_k <= DIRECT_PAIRS and not separate
        if not moe.spec.chooses_plainly:
            return self.add_scored(residual, norm, moe, activation, directly)
        return (self.add_directly if directly else self.add_grouped)(residual, norm, moe, activation)

    def add_directly(self, residual: torch.Tensor, norm: Norm, moe: Moe, activation: str) -> torch.Tensor:
        """For a few tokens."""
        norms = norm.weight, norm.epsilon, norm.plus_one
        shared = moe.shared
        extra = 0 if shared is None else 1
        tokens, size = len(residual), moe.all_down.shape[2]
        logits = residual.new_empty(tokens, moe.spec.experts + extra, dtype=torch.float32)
        ids, weights = room_for_choice(residual, moe.spec.top_k, extra)
        self.ops.router(
            residual,
            *norms,
            moe.router.weight,
            None if moe.shared_gate is None else moe.shared_gate.weight,
            moe.spec.renormalize,
            logits,
            self.products.workspace.counters,
            ids,
            weights,
        )
        shared_size = 0 if shared is None else len(shared.gate_up.weight) // 2
        inner = residual.new_empty(tokens, moe.spec.top_k * size + shared_size)
        shared_gate_up, shared_down = (None, None) if shared is None else (shared.gate_up.weight, shared.down.weight)
        self.ops.expert_gate_up(residual, *norms, ids, moe.all_gate_up, shared_gate_up, activation, inner)
        self.ops.expert_down(inner, ids, weights, moe.all_down, shared_down, residual, residual)
        return ids

    def add_grouped(self, residual: torch.Tensor, norm: Norm, moe: Moe, activation: str) -> torch.Tensor:
        """For more tokens."""
        x, logits = self.routed(residual, norm, moe)
        ids, weights = room_for_choice(x, moe.spec.top_k, 0)
        self.ops.choose_experts(logits, moe.spec.renormalize, ids, weights)
        y = self.each(x, ids, moe, activation)
        self.ops.expert_sum(y, weights, *self.shared(x, moe, activation), residual, residual)
        return ids

    def add_scored(self, residual: torch.Tensor, norm: Norm, moe: Moe, activation: str, directly: bool) -> torch.Tensor:
        """With a choice that the kernels do not know: torch's operations make it."""
        x, logits = self.routed(residual, norm, moe)
        spec = moe.spec
        scores = logits.softmax(dim=-1) if spec.scoring == "softmax" else logits.sigmoid()
        choice = spec.top_k, spec.renormalize, spec.groups, spec.top_groups, spec.group_best
        scores, chosen = choose_scored_experts(scores, moe.score_bias, *choice)
        ids, weights = chosen.to(torch.int32), scores * spec.scale
        if directly:
            inner = x.new_empty(len(x), spec.top_k * moe.all_down.shape[2])
            norms = norm.weight, norm.epsilon, norm.plus_one
            self.ops.expert_gate_up(residual, *norms, ids, moe.all_gate_up, None, activation, inner)
            self.ops.expert_down(inner, ids, weights, moe.all_down, None, residual, residual)
        else:
            self.ops.expert_sum(self.each(x, ids, moe, activation), weights, None, None, residual, residual)
        if moe.shared is not None:
            self.products.add(self.products.gated(x, moe.shared.gate_up, activation), moe.shared.down, residual)
        return ids

    def routed(self, residual: torch.Tensor, norm: Norm, moe: Moe) -> tuple[torch.Tensor, torch.Tensor]:
        """norm(residual), and the router's logits (tokens, experts) in float32."""
        x = torch.empty_like(residual)
        self.ops.rms_norm(residual, norm.weight, norm.epsilon, norm.plus_one, x)
        logits = x.new_empty(len(x), moe.spec.experts, dtype=torch.float32)
        self.products.write(x, moe.router, logits)
        return x, logits

    def each(self, x: torch.Tensor, ids: torch.Tensor, moe: Moe, activation: str) -> torch.Tensor:
        """What every chosen expert gives for its tokens of x (tokens, hidden): (tokens * top_k, hidden)."""
        experts = moe.spec.experts
        total = ids.numel()
        block = STEADY_EXPERT_BLOCK if self.products.steady else block_size(total, experts)
        blocks = min(total, total // block + experts)  # enough, however the pairs are spread
        pairs = torch.empty(blocks * block, dtype=torch.int32, device=x.device)
        block_experts = torch.empty(blocks, dtype=torch.int32, device=x.device)
        self.ops.align_experts(ids, experts, block, pairs, block_experts)
        inner, y = x.new_empty(total, moe.all_down.shape[2]), x.new_empty(total, x.shape[1])
        adapters = self.products.adapters
        added = None if adapters is None else adapters.of_experts(ids, experts)
        if self.products.adds_adapters:
            gate_up = x.new_empty(total, moe.all_gate_up.shape[1])
            self.ops.expert_gemm(x, pairs, block_experts, block, moe.all_gate_up, None, gate_up)
            if added is not None:
                added.add(x, moe.gate_up, gate_up)
            self.ops.gated_activation(gate_up, activation, inner)
        else:
            self.ops.expert_gemm(x, pairs, block_experts, block, moe.all_gate_up, activation, inner)
        self.ops.expert_gemm(inner, pairs, block_experts, block, moe.all_down, None, y)
        if added is not None:
            added.add(inner, moe.down, y)
        return y

    def shared(self, x: torch.Tensor, moe: Moe, activation: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the expert of all tokens gives, and the logit of its gate (tokens, 1)."""
        if moe.shared is None or moe.shared_gate is None:
            return None, None
        inner = self.products.gated(x, moe.shared.gate_up, activation)
        return self.products(inner, moe.shared.down), self.products(x, moe.shared_gate)


def room_for_choice(x: torch.Tensor, top_k: int, extra: int) -> Choice:
    """Memory for the experts of x (tokens, hidden), and for `extra` weights more than experts."""
    ids = torch.empty(len(x), top_k, dtype=torch.int32, device=x.device)
    return ids, x.new_empty(len(x), top_k + extra, dtype=torch.float32)


def block_size(pairs: int, experts: int) -> int:
    """Pairs of one program: about what an expert gets."""
    return next((block for block in EXPERT_BLOCKS if pairs <= block * experts), EXPERT_BLOCKS[-1])
