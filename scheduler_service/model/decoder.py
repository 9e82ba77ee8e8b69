"""The generic decoder: any model of the Llama kind, from its spec and its weights."""

from functools import partial

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.linear import Linear
from scheduler_service.model.attention import Attention, Rotation
from scheduler_service.model.batch import AttentionSpec, Batch, ExpertShape
from scheduler_service.model.heads import Head
from scheduler_service.model.layers import Mlp, Norm, linear, optional_norm
from scheduler_service.model.moe import Moe
from scheduler_service.model.spec import DecoderSpec
from scheduler_service.model.weights import Weights


class DecoderLayer:
    """x + attention(x), then x + feed_forward(x), with norms before and after each as the spec says."""

    def __init__(self, spec: DecoderSpec, weights: Weights, layer: int) -> None:
        self.layer = layer
        self.rope = spec.layers[layer].rope
        norm = partial(optional_norm, spec, weights, layer=layer)
        self.before_attention, self.after_attention = norm("before_attention"), norm("after_attention")
        self.before_mlp, self.after_mlp = norm("before_mlp"), norm("after_mlp")
        self.attention = Attention(spec, weights, layer)
        self.moe: Moe | None = None
        same_kind = [bool(before.moe) for before in spec.layers[:layer]].count(bool(spec.layers[layer].moe))
        if moe := spec.layers[layer].moe:
            self.moe = Moe(spec, moe, weights, same_kind)
        else:
            self.mlp = Mlp.dense(spec, weights, same_kind)

    def __call__(self, x: torch.Tensor, rotation: Rotation, batch: Batch) -> torch.Tensor:
        y = self.attention(apply(self.before_attention, x), rotation, batch)
        x = x + apply(self.after_attention, y)
        y = self.feed_forward(apply(self.before_mlp, x), batch)
        return x + apply(self.after_mlp, y)

    def feed_forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.moe is None:
            return self.mlp(x)
        return self.moe(x, partial(batch.record_experts, self.layer) if batch.record_experts else None)


class Decoder:
    """A causal language model as the worker uses it."""

    def __init__(self, spec: DecoderSpec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.dtype = weights.dtype
        self.device = weights.device
        self.hidden_size = spec.hidden_size
        self.vocab_size = spec.vocab_size
        self.embedding = weights.slab("embed")  # (vocab, hidden)
        self.embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=self.dtype))
        self.rotary = [(torch.tensor(rope.frequencies, device=self.device), rope.factor) for rope in spec.ropes]
        self.layers = [DecoderLayer(spec, weights, layer) for layer in range(len(spec.layers))]
        self.norm = Norm(spec, weights.slab("norm"))
        self.lm_head: Linear | None = None
        if spec.generates:
            self.lm_head = linear(weights, "embed" if spec.tied else "lm_head")
        self.head = Head(spec.score_head, weights) if spec.score_head else None
        self.attention: list[AttentionSpec] = [layer.attention.facts for layer in self.layers]

    @property
    def experts(self) -> ExpertShape | None:
        """The mixtures that report to `Batch.record_experts`; None for a dense model."""
        mixtures = [layer.moe for layer in self.spec.layers if layer.moe]
        if not mixtures:
            return None
        return ExpertShape(len(self.layers), max(m.experts for m in mixtures), max(m.top_k for m in mixtures))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm: (tokens, hidden)."""
        x = self.embed(batch)
        rotations = [reference.rotation(batch.positions, *rotary, self.dtype) for rotary in self.rotary]
        for layer in self.layers:
            x = layer(x, rotations[layer.rope], batch)
        return self.norm(x)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Token embeddings, or the request's own where it brought some: (tokens, hidden)."""
        x = F.embedding(batch.input_ids, self.embedding)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if batch.embeds is None or batch.embeds_mask is None:
            return x
        return torch.where(batch.embeds_mask.unsqueeze(1), batch.embeds.to(x.dtype), x)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) → float32 (rows, vocab), into `out` if there is one."""
        assert self.lm_head is not None, "an embedder predicts no next token"
        if out is None:
            out = hidden.new_empty(len(hidden), self.vocab_size, dtype=torch.float32)
        self.lm_head.write(hidden, out)
        cap = self.spec.logit_softcap
        return out if cap is None else out.copy_(reference.soft_cap(out, cap))


def apply(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)
