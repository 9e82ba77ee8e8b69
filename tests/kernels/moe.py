"""Cases of the mixture of experts."""

import torch

from tests.kernels.cases import EPSILON, Arguments, Maker, cases


def chosen(make: Maker, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Different experts for each token: (tokens, top_k) int32."""
    if make.device == "meta":
        return make.zeros(tokens, top_k)
    return (
        torch.stack([torch.randperm(experts, generator=make.generator)[:top_k] for _ in range(tokens)])
        .int()
        .to(make.device)
    )


def router(
    make: Maker,
    tokens: int,
    hidden: int,
    experts: int,
    top_k: int,
    norm: bool = True,
    shared: bool = False,
    renormalize: bool = False,
) -> Arguments:
    return {
        "x": make.normal(tokens, hidden),
        "norm_weight": make.near_one(hidden) if norm else None,
        "epsilon": EPSILON,
        "plus_one": False,
        "weight": make.weight(experts, hidden),
        "shared_gate": make.weight(1, hidden) if shared else None,
        "renormalize": renormalize,
        "logits": make.poisoned(tokens, experts + shared, dtype=torch.float32),
        "counters": make.zeros(tokens),
        "ids": make.poisoned(tokens, top_k, dtype=torch.int32),
        "weights": make.poisoned(tokens, top_k + shared, dtype=torch.float32),
    }


def choose_experts(make: Maker, tokens: int, experts: int, top_k: int, renormalize: bool = False) -> Arguments:
    return {
        "logits": make.normal(tokens, experts, dtype=torch.float32),
        "renormalize": renormalize,
        "ids": make.poisoned(tokens, top_k, dtype=torch.int32),
        "weights": make.poisoned(tokens, top_k, dtype=torch.float32),
    }


def expert_gate_up(
    make: Maker,
    tokens: int,
    hidden: int,
    experts: int,
    top_k: int,
    size: int,
    shared_size: int = 0,
    norm: bool = True,
    activation: str = "silu",
) -> Arguments:
    return {
        "x": make.normal(tokens, hidden),
        "norm_weight": make.near_one(hidden) if norm else None,
        "epsilon": EPSILON,
        "plus_one": False,
        "ids": chosen(make, tokens, experts, top_k),
        "gate_up": make.weight(experts, 2 * size, hidden),
        "shared_gate_up": make.weight(2 * shared_size, hidden) if shared_size else None,
        "activation": activation,
        "out": make.poisoned(tokens, top_k * size + shared_size),
    }


def expert_down(
    make: Maker,
    tokens: int,
    hidden: int,
    experts: int,
    top_k: int,
    size: int,
    shared_size: int = 0,
    residual: bool = True,
) -> Arguments:
    return {
        "inner": make.normal(tokens, top_k * size + shared_size),
        "ids": chosen(make, tokens, experts, top_k),
        "weights": make.normal(tokens, top_k + bool(shared_size), dtype=torch.float32),
        "down": make.weight(experts, hidden, size),
        "shared_down": make.weight(hidden, shared_size) if shared_size else None,
        "residual": make.normal(tokens, hidden) if residual else None,
        "out": make.poisoned(tokens, hidden),
    }


def align_experts(make: Maker, tokens: int, experts: int, top_k: int, block: int) -> Arguments:
    blocks = tokens * top_k // block + experts
    return {
        "ids": chosen(make, tokens, experts, top_k),
        "experts": experts,
        "block": block,
        "pairs": make.poisoned(blocks * block, dtype=torch.int32),
        "block_experts": make.poisoned(blocks, dtype=torch.int32),
    }


def expert_gemm(
    make: Maker,
    rows: int,
    columns: int,
    experts: int,
    size: int,
    block: int,
    rows_share: int = 1,
    activation: str | None = None,
) -> Arguments:
    """Pairs in a made-up order: expert after expert, each with one block that is not full."""
    total = rows * rows_share
    share = -(-total // experts)
    own = [list(range(first, min(first + share, total))) for first in range(0, total, share)]
    blocks = [pairs[i : i + block] for pairs in own for i in range(0, len(pairs), block)]
    owners = [expert for expert, pairs in enumerate(own) for _ in range(0, len(pairs), block)]
    return {
        "x": make.normal(rows, columns),
        "pairs": make.given([pair for pairs in [*blocks, []] for pair in pairs + [total] * (block - len(pairs))]),
        "block_experts": make.given([*owners, -1]),
        "block": block,
        "weight": make.weight(experts, size * (2 if activation else 1), columns),
        "activation": activation,
        "out": make.poisoned(total, size),
    }


def expert_sum(
    make: Maker, tokens: int, hidden: int, top_k: int, shared: bool = False, residual: bool = True
) -> Arguments:
    return {
        "y": make.normal(tokens * top_k, hidden),
        "weights": make.normal(tokens, top_k, dtype=torch.float32),
        "shared": make.normal(tokens, hidden) if shared else None,
        "shared_logits": make.normal(tokens, 1) if shared else None,
        "residual": make.normal(tokens, hidden) if residual else None,
        "out": make.poisoned(tokens, hidden),
    }


ROUTED = ("ids", "weights")
SMALL = [
    *cases(
        router,
        (*ROUTED, "logits", "counters"),
        {"tokens": 2, "hidden": 48, "experts": 12, "top_k": 3, "shared": True},
        {"tokens": 1, "hidden": 1100, "experts": 8, "top_k": 2, "norm": False, "renormalize": True},
    ),
    *cases(
        choose_experts,
        ROUTED,
        {"tokens": 3, "experts": 12, "top_k": 3},
        {"tokens": 2, "experts": 8, "top_k": 4, "renormalize": True},
    ),
    *cases(
        expert_gate_up,
        ("out",),
        {"tokens": 2, "hidden": 48, "experts": 5, "top_k": 2, "size": 10, "shared_size": 14},
        {"tokens": 1, "hidden": 48, "experts": 5, "top_k": 3, "size": 8, "norm": False, "activation": "gelu"},
    ),
    *cases(
        expert_down,
        ("out",),
        {"tokens": 2, "hidden": 10, "experts": 5, "top_k": 2, "size": 40, "shared_size": 600},
        {"tokens": 1, "hidden": 8, "experts": 5, "top_k": 3, "size": 40, "residual": False},
    ),
    *cases(
        align_experts,
        ("pairs", "block_experts"),
        {"tokens": 40, "experts": 5, "top_k": 3, "block": 16},
        {"tokens": 700, "experts": 3, "top_k": 2, "block": 32},
        {"tokens": 1, "experts": 5, "top_k": 2, "block": 16},
    ),
    *cases(
        expert_gemm,
        ("out",),
        {"rows": 20, "columns": 40, "experts": 3, "size": 70, "block": 16, "rows_share": 3, "activation": "silu"},
        {"rows": 40, "columns": 100, "experts": 2, "size": 30, "block": 32},
    ),
    *cases(
        expert_sum,
        ("out",),
        {"tokens": 2, "hidden": 40, "top_k": 3, "shared": True},
        {"tokens": 1, "hidden": 40, "top_k": 2, "residual": False},
    ),
]
# Qwen1.5-MoE-A2.7B
SERVED = [
    *cases(
        router,
        (*ROUTED, "logits", "counters"),
        {"tokens": 1, "hidden": 2048, "experts": 60, "top_k": 4, "shared": True},
    ),
    *cases(choose_experts, ROUTED, {"tokens": 64, "experts": 60, "top_k": 4}),
    *cases(
        expert_gate_up,
        ("out",),
        {"tokens": 1, "hidden": 2048, "experts": 60, "top_k": 4, "size": 1408, "shared_size": 5632},
    ),
    *cases(
        expert_down,
        ("out",),
        {"tokens": 1, "hidden": 2048, "experts": 60, "top_k": 4, "size": 1408, "shared_size": 5632},
    ),
    *cases(align_experts, ("pairs", "block_experts"), {"tokens": 256, "experts": 60, "top_k": 4, "block": 16}),
    *cases(
        expert_gemm,
        ("out",),
        {
            "rows": 64,
            "columns": 2048,
            "experts": 60,
            "size": 1408,
            "block": 16,
            "rows_share": 4,
            "activation": "silu",
        },
        {"rows": 256, "columns": 1408, "experts": 60, "size": 2048, "block": 16},
        {
            "rows": 2048,
            "columns": 2048,
            "experts": 60,
            "size": 1408,
            "block": 64,
            "rows_share": 4,
            "activation": "silu",
        },
    ),
    *cases(expert_sum, ("out",), {"tokens": 64, "hidden": 2048, "top_k": 4, "shared": True}),
]
