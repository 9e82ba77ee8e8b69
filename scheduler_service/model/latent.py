"""Attention whose keys and values are made of one latent vector per token (multi-head latent attention).

The pool keeps that vector and one rotated key, which all heads share, instead of keys and values of every head. What
makes keys of it is applied to the queries, and what makes values of it to the result, so nothing is expanded:

    key = W latent      so  query · key = (W' query) · latent
    value = V latent    so  Σ share value = V Σ share latent
"""

from collections.abc import Callable

import torch

from quartet.kernels.reference.layers import rotate
from quartet.scheduler_service.model.batch import Attend
from quartet.scheduler_service.model.layers import LatentAttention, Norm
from quartet.scheduler_service.model.spec import DecoderSpec, LatentSpec
from quartet.scheduler_service.weights.parameters import Layout

Rotation = tuple[torch.Tensor, torch.Tensor]


def add_latent(layout: Layout, spec: DecoderSpec, latent: LatentSpec, layer: int, prefix: str) -> None:
    """Places for the tensors of one layer's attention."""
    hidden, place = spec.hidden_size, (layer,)
    queries = spec.heads * (latent.plain_dim + latent.rotated_dim)
    if rank := latent.query_rank:
        layout.add("query_down", place, [(f"{prefix}q_a_proj.weight", rank)], hidden)
        layout.add("query_down_norm", place, [(f"{prefix}q_a_layernorm.weight", rank)], None)
        layout.add("query", place, [(f"{prefix}q_b_proj.weight", queries)], rank)
    else:
        layout.add("query", place, [(f"{prefix}q_proj.weight", queries)], hidden)
    kept = latent.rank + latent.rotated_dim
    layout.add("kv_down", place, [(f"{prefix}kv_a_proj_with_mqa.weight", kept)], hidden)
    layout.add("kv_norm", place, [(f"{prefix}kv_a_layernorm.weight", latent.rank)], None)
    made = spec.heads * (latent.plain_dim + latent.value_dim)
    layout.add("kv_up", place, [(f"{prefix}kv_b_proj.weight", made)], latent.rank)
    layout.add("output", place, [(f"{prefix}o_proj.weight", hidden)], spec.heads * latent.value_dim)
    if spec.qkv_bias:
        layout.add("kv_down_bias", place, [(f"{prefix}kv_a_proj_with_mqa.bias", kept)], None)
        if latent.query_rank:
            layout.add("query_down_bias", place, [(f"{prefix}q_a_proj.bias", latent.query_rank)], None)
    if spec.output_bias:
        layout.add("output_bias", place, [(f"{prefix}o_proj.bias", hidden)], None)


def attend(
    x: torch.Tensor,
    attention: LatentAttention,
    rotation: Rotation,
    context: Attend,
    normed: Callable[[torch.Tensor, Norm | None], torch.Tensor],
) -> torch.Tensor:
    """x (tokens, hidden), normed, to the mixed values of all heads (tokens, heads * value_dim)."""
    spec, sizes = attention.spec, attention.latent
    tokens, rank = len(x), sizes.rank
    narrow = x if attention.query_down is None else normed(attention.query_down(x), attention.query_down_norm)
    queries = attention.query(narrow).view(tokens, spec.heads, -1)
    plain, turned = queries.split((sizes.plain_dim, sizes.rotated_dim), dim=2)
    latent, key = attention.kv_down(x).split((rank, sizes.rotated_dim), dim=1)
    latent = normed(latent.contiguous(), attention.kv_norm)
    turned, key = (in_order(part, attention) for part in (turned, key.unsqueeze(1)))
    turned, key = rotate(turned, *rotation), rotate(key, *rotation)
    up = attention.kv_up.view(spec.heads, sizes.plain_dim + sizes.value_dim, rank)
    to_key, to_value = up.split((sizes.plain_dim, sizes.value_dim), dim=1)
    query = torch.cat((torch.einsum("thp,hpr->thr", plain, to_key), turned), dim=2)
    kept = torch.cat((latent.unsqueeze(1), key), dim=2)  # (tokens, 1, rank + rotated_dim)
    mixed = context(spec, query, kept, kept)[..., :rank]
    return torch.einsum("thr,hvr->thv", mixed, to_value).reshape(tokens, -1)


def in_order(x: torch.Tensor, attention: LatentAttention) -> torch.Tensor:
    """x (tokens, heads, dim) with the two of a pair half of the dimensions apart; scores do not depend on the order."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) if attention.interleaved else x
