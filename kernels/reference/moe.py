"""The mixture of experts in plain torch, one operation for each Triton kernel of the same name and signature."""

import torch

from quartet.kernels.reference import layers
from quartet.kernels.reference.dense import ACTIVATIONS, linear, normed


def router(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    weight: torch.Tensor,
    shared_gate: torch.Tensor | None,
    renormalize: bool,
    logits: torch.Tensor,
    counters: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.router."""
    rows = weight if shared_gate is None else torch.cat((weight, shared_gate))
    logits.copy_(linear(normed(x, norm_weight, epsilon, plus_one), rows))
    choose_experts(logits[:, : len(weight)], renormalize, ids, weights)
    if shared_gate is not None:
        weights[:, -1] = logits[:, -1].sigmoid()


def choose_experts(
    logits: torch.Tensor,
    renormalize: bool,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.choose_experts."""
    top_k = ids.shape[1]
    chosen_weights, chosen = layers.choose_experts(logits, top_k, renormalize)
    ids.copy_(chosen)
    weights[:, :top_k] = chosen_weights


def expert_gate_up(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    plus_one: bool,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.expert_gate_up."""
    rows = normed(x, norm_weight, epsilon, plus_one)
    both = torch.einsum("th,tksh->tks", rows, gate_up[ids.long()].float())
    inner = ACTIVATIONS[activation](both).flatten(1)
    out[:, : inner.shape[1]] = inner
    if shared_gate_up is not None:
        out[:, inner.shape[1] :] = ACTIVATIONS[activation](linear(rows, shared_gate_up))


def expert_down(
    inner: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    down: torch.Tensor,
    shared_down: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.expert_down."""
    (tokens, top_k), size = ids.shape, down.shape[2]
    own = inner[:, : top_k * size].float().view(tokens, top_k, size)
    y = torch.einsum("tks,tkhs,tk->th", own, down[ids.long()].float(), weights[:, :top_k])
    if shared_down is not None:
        y = y + weights[:, top_k:] * linear(inner[:, top_k * size :], shared_down)
    out.copy_(y if residual is None else y + residual.float())


def align_experts(
    ids: torch.Tensor, experts: int, block: int, pairs: torch.Tensor, block_experts: torch.Tensor
) -> None:
    """See kernels.operations.Ops.align_experts."""
    flat = ids.flatten()
    place = 0
    block_experts.fill_(-1)
    for expert in range(experts):
        own = (flat == expert).nonzero().flatten()
        used = -(-len(own) // block)
        pairs[place : place + used * block] = len(flat)
        pairs[place : place + len(own)] = own.to(pairs.dtype)
        block_experts[place // block : place // block + used] = expert
        place += used * block


def expert_gemm(
    x: torch.Tensor,
    pairs: torch.Tensor,
    block_experts: torch.Tensor,
    block: int,
    weight: torch.Tensor,
    activation: str | None,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.expert_gemm."""
    for number, expert in enumerate(block_experts.tolist()):
        if expert < 0:
            break
        own = pairs[number * block : (number + 1) * block].long()
        own = own[own < len(out)]
        y = linear(x[own // (len(out) // len(x))], weight[expert])
        out[own] = (y if activation is None else ACTIVATIONS[activation](y)).to(out.dtype)


def expert_sum(
    y: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    shared_logits: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """See kernels.operations.Ops.expert_sum."""
    total = torch.einsum("tkh,tk->th", y.float().view(len(out), -1, y.shape[1]), weights)
    if shared is not None and shared_logits is not None:
        total = total + shared_logits.float().sigmoid() * shared.float()
    out.copy_(total if residual is None else total + residual.float())
