"""The generic encoder: BERT and its kin, over texts side by side without any padding.

Attention of a text needs only that text. The texts of a step are put in order of length, so that those of one length
are attended in one call, as a view of the packed rows; no text is ever padded to another's length.
"""

import math

import torch
import torch.nn.functional as F

from quartet.kernels.reference import layers as plain_layers
from quartet.scheduler_service.model.backend import Rotation
from quartet.scheduler_service.model.batch import AttentionSpec, Batch
from quartet.scheduler_service.model.encoder_attention import (
    AddedBias,
    AddedProducts,
    Group,
    HeadByHead,
    Project,
    ScoresOfLayer,
    by_length,
    near,
)
from quartet.scheduler_service.model.encoder_moe import Experts
from quartet.scheduler_service.model.encoder_spec import DistanceBias, DistanceVectors, EncoderSpec
from quartet.scheduler_service.model.heads import ACTIVATIONS, Head
from quartet.scheduler_service.model.layers import linear
from quartet.scheduler_service.model.task_adapters import TaskAdapters
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows
from quartet.scheduler_service.weights.parameters import Weights

GATED = {"gelu": plain_layers.gelu_and_mul, "silu": plain_layers.silu_and_mul}


class Norm:
    """A norm over the hidden dimension."""

    def __init__(self, spec: EncoderSpec, weights: Weights, buffer: str, *index: int) -> None:
        self.weight = weights.slab(buffer, *index)
        self.bias = weights.slab(f"{buffer}_bias", *index) if spec.norm_bias else None
        self.rms = spec.norm == "rms"
        self.epsilon = spec.norm_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.rms:
            return plain_layers.rms_norm(x, self.weight, self.epsilon)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class EncoderLayer:
    """Attention and feed-forward, each added to its input, with the norms before or behind them."""

    def __init__(self, spec: EncoderSpec, weights: Weights, layer: int) -> None:
        own = spec.layers[layer]
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads or spec.heads, spec.head_dim
        self.scale = None if spec.relative is None else attention_scale(spec)
        self.window, self.rope, self.norm_first = own.window, own.rope, spec.norm_first
        self.attention_norm = Norm(spec, weights, "attention_norm", layer) if own.attention_norm else None
        self.mlp_norm = Norm(spec, weights, "mlp_norm", layer)
        self.qkv: Project
        self.of_distances: Project
        if spec.head_by_head:
            self.qkv = joint = HeadByHead(spec, weights, layer)
            self.of_distances = joint.of_distances
        else:
            self.qkv = self.of_distances = linear(weights, "qkv", layer, bias=spec.attention_bias)
        self.output = linear(weights, "output", layer, bias=spec.attention_bias)
        place = spec.block_place(layer)
        self.experts = Experts(spec, spec.moe, weights, place) if spec.moe and own.experts else None
        if self.experts is None:
            self.up = linear(weights, "up", place, bias=spec.up_bias)
            self.down = linear(weights, "down", place, bias=spec.down_bias)
        self.activation = (GATED if spec.gated else ACTIVATIONS)[spec.activation]
        self.gate_last = spec.gate_last
        self.plain_gelu = spec.activation == "gelu" and not spec.gated

    def __call__(
        self, x: torch.Tensor, rotation: Rotation | None, groups: list[Group], added: ScoresOfLayer | None
    ) -> torch.Tensor:
        if self.norm_first:
            x = x + self.attend(self.attention_norm(x) if self.attention_norm else x, rotation, groups, added)
            return x + self.feed_forward(self.mlp_norm(x))
        assert self.attention_norm is not None
        x = self.attention_norm(x + self.attend(x, rotation, groups, added))
        return self.mlp_norm(x + self.feed_forward(x))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """What stands behind attention: (tokens, hidden) of x (tokens, hidden)."""
        if self.experts is not None:
            return self.experts(x)
        if self.plain_gelu:
            return self.down(self.up(x, gelu=True))
        x = self.up(x)
        if self.gate_last:
            x = x.roll(x.shape[-1] // 2, dims=-1)
        return self.down(self.activation(x))

    def attend(
        self, x: torch.Tensor, rotation: Rotation | None, groups: list[Group], added: ScoresOfLayer | None
    ) -> torch.Tensor:
        """Attention of each text over itself: (tokens, hidden) from x (tokens, hidden)."""
        tokens, hidden = x.shape
        shares = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv(x).view(tokens, sum(shares), self.head_dim)
        if rotation is not None:
            turned, values = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
            qkv = torch.cat((plain_layers.rotate(turned, *rotation), values), dim=1)
        scores = added(self.of_distances) if added else None
        mixed = torch.empty_like(x)
        for group in groups:
            rows = slice(group.start, group.start + group.texts * group.length)
            heads = qkv[rows].view(group.texts, group.length, sum(shares), self.head_dim).transpose(1, 2)
            q, k, v = heads.split(shares, dim=1)  # each (texts, heads, length, dim)
            mask = scores(q, k) if scores else near(self.window, group.length, x.device)
            if group.attended < group.length:
                k, v = k[:, :, : group.attended], v[:, :, : group.attended]
                mask = None if mask is None else mask[..., : group.attended]
            grouped = self.kv_heads < self.heads
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
            mixed[rows] = out.transpose(1, 2).reshape(-1, hidden)  # (tokens of the group, hidden)
        return self.output(mixed)


def attention_scale(spec: EncoderSpec) -> float:
    """Of products of queries and keys, where there are other terms beside them."""
    terms = spec.relative.terms if isinstance(spec.relative, DistanceVectors) else 1
    return 1 / math.sqrt(spec.head_dim * terms)


def added_scores(spec: EncoderSpec, weights: Weights) -> AddedBias | AddedProducts | None:
    """What adds to the scores of a spec's attention."""
    if spec.relative is None:
        return None
    return (
        AddedBias(spec.relative, weights) if isinstance(spec.relative, DistanceBias) else AddedProducts(spec, weights)
    )


class Encoder:
    """A bidirectional model as the worker uses it. It keeps no KV."""

    attention: list[AttentionSpec] = []

    def __init__(self, spec: EncoderSpec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.dtype = weights.dtype
        self.device = weights.device
        self.hidden_size = spec.hidden_size
        self.vocab_size = spec.vocab_size
        self.words = weights.slab("words")  # (vocab, hidden)
        self.positions = weights.slab("positions") if spec.positions else None
        self.types = weights.slab("types") if spec.token_types else None
        self.embedding_norm = Norm(spec, weights, "embedding_norm") if spec.embedding_norm else None
        self.added = added_scores(spec, weights)
        self.rotary = [(torch.tensor(rope.frequencies, device=self.device), rope.factor) for rope in spec.ropes]
        self.layers = [EncoderLayer(spec, weights, layer) for layer in range(len(spec.layers))]
        self.final_norm = Norm(spec, weights, "final_norm") if spec.norm_first else None
        self.head = Head(spec.head, weights) if spec.head else None
        self.word_head = Head((spec.word_head.transform,), weights, "word_head") if spec.word_head else None
        self.word_bias = weights.slab("word_bias") if spec.word_head and spec.word_head.bias else None
        self.tasks = None if spec.tasks is None else TaskAdapters(spec, spec.tasks, weights)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states of the last layer, in the batch's order: (tokens, hidden)."""
        order, groups = by_length(batch.starts, batch.attended)
        order = order.to(self.device)
        if self.tasks is None or batch.tasks is None:
            return self.in_order(batch, order, groups, self.embed(batch))
        owners = self.tasks.owners(batch.tasks, batch.starts)
        with self.tasks.of_rows(owners[order]):
            return self.in_order(batch, order, groups, self.embed(batch, owners))

    def in_order(self, batch: Batch, order: torch.Tensor, groups: list[Group], embedded: torch.Tensor) -> torch.Tensor:
        """The same from embeddings (tokens, hidden); the layers compute texts of one length side by side."""
        x = embedded[order]
        added = None
        if self.added is not None:
            added = self.added.prepare(groups[-1].length)
            groups = [part for group in groups for part in group.parts(self.spec.heads)]
        rotations = [plain_layers.rotation(batch.positions[order], *rotary, self.dtype) for rotary in self.rotary]
        for layer in self.layers:
            x = layer(x, rotations[layer.rope] if rotations else None, groups, added)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return torch.empty_like(x).index_copy_(0, order, x)

    def embed(self, batch: Batch, owners: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of the tables' rows for each token, normed: (tokens, hidden). `owners`: of tokens, of their tasks."""
        x = F.embedding(batch.input_ids, self.words)
        if self.tasks is not None and owners is not None:
            x = x + self.tasks.of_table("words", batch.input_ids, owners)
        if batch.embeds is not None and batch.embeds_mask is not None:
            x = torch.where(batch.embeds_mask.unsqueeze(1), batch.embeds.to(x.dtype), x)
        if self.types is not None:
            types = torch.zeros_like(batch.input_ids) if batch.token_types is None else batch.token_types
            x = x + (self.types[0] if batch.token_types is None else F.embedding(types, self.types))
            if self.tasks is not None and owners is not None:
                x = x + self.tasks.of_table("types", types, owners)
        if self.positions is not None:
            x = x + F.embedding(batch.positions + self.spec.first_position, self.positions)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def word_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What word may stand at each place: (tokens, hidden) → float32 (tokens, vocab)."""
        assert self.word_head is not None
        return F.linear(self.word_head(hidden), self.words, self.word_bias).float()

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError("an encoder predicts no next token")

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        raise NotImplementedError("an encoder predicts no next token")
