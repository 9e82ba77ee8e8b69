"""Attention of one layer: project, norm, rotate, and leave the rest to the batch's `attend`."""

import torch

from kernels import reference
from scheduler_service.model.batch import AttentionSpec, Batch
from scheduler_service.model.layers import Norm, linear
from scheduler_service.model.spec import DecoderSpec
from scheduler_service.model.weights import Weights

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and signed sines, each (tokens, 1, rotary_dim)


class Attention:
    """Self-attention over whatever context `attend` knows."""

    def __init__(self, spec: DecoderSpec, weights: Weights, layer: int) -> None:
        self.facts = AttentionSpec(
            layer=layer,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            scale=spec.attention_scale,
            window=spec.layers[layer].window,
            softcap=spec.attention_softcap,
            causal=spec.causal,
        )
        self.qkv = linear(weights, "qkv", layer, bias=spec.qkv_bias)
        self.output = linear(weights, "output", layer, bias=spec.output_bias)
        self.query_norm = Norm(spec, weights.slab("query_norm", layer)) if spec.query_key_norm else None
        self.key_norm = Norm(spec, weights.slab("key_norm", layer)) if spec.query_key_norm else None

    def __call__(self, x: torch.Tensor, rotation: Rotation, batch: Batch) -> torch.Tensor:
        heads, kv_heads = self.facts.heads, self.facts.kv_heads
        projected = self.qkv(x).view(len(x), heads + 2 * kv_heads, self.facts.head_dim)
        query_key, value = projected.split((heads + kv_heads, kv_heads), dim=1)  # (tokens, heads, dim)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.split((heads, kv_heads), dim=1)
            query_key = torch.cat((self.query_norm(query), self.key_norm(key)), dim=1)
        query, key = reference.rotate(query_key, *rotation).split((heads, kv_heads), dim=1)
        mixed = batch.attend(self.facts, query, key, value)
        return self.output(mixed.reshape(len(x), -1))
