"""The generic encoder: BERT and its kin, over texts side by side without any padding.

Attention of a text needs only that text. The texts of a step are put in order of length, so that those of one length
are attended in one call, as a view of the packed rows; no text is ever padded to another's length.
"""

from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F

from quartet.kernels.reference import layers as plain_layers
from quartet.scheduler_service.model.backend import Rotation
from quartet.scheduler_service.model.batch import AttentionSpec, Batch
from quartet.scheduler_service.model.encoder_spec import EncoderSpec
from quartet.scheduler_service.model.heads import ACTIVATIONS, Head
from quartet.scheduler_service.model.layers import linear
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows
from quartet.scheduler_service.weights.parameters import Weights

GATED = {"gelu": plain_layers.gelu_and_mul, "silu": plain_layers.silu_and_mul}


@dataclass(frozen=True, slots=True)
class Group:
    """Texts of one length, side by side."""

    start: int  # first row
    texts: int
    length: int


class LayerNorm:
    """A layer norm over the hidden dimension."""

    def __init__(self, spec: EncoderSpec, weights: Weights, buffer: str, *index: int) -> None:
        self.weight = weights.slab(buffer, *index)
        self.bias = weights.slab(f"{buffer}_bias", *index) if spec.norm_bias else None
        self.epsilon = spec.norm_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class EncoderLayer:
    """Attention and feed-forward, each added to its input, with the norms before or behind them."""

    def __init__(self, spec: EncoderSpec, weights: Weights, layer: int) -> None:
        own = spec.layers[layer]
        self.heads = spec.heads
        self.window, self.rope, self.norm_first = own.window, own.rope, spec.norm_first
        self.attention_norm = LayerNorm(spec, weights, "attention_norm", layer) if own.attention_norm else None
        self.mlp_norm = LayerNorm(spec, weights, "mlp_norm", layer)
        self.qkv = linear(weights, "qkv", layer, bias=spec.attention_bias)
        self.output = linear(weights, "output", layer, bias=spec.attention_bias)
        self.up = linear(weights, "up", layer, bias=spec.mlp_bias)
        self.down = linear(weights, "down", layer, bias=spec.mlp_bias)
        self.activation = (GATED if spec.gated else ACTIVATIONS)[spec.activation]
        self.plain_gelu = spec.activation == "gelu" and not spec.gated

    def __call__(self, x: torch.Tensor, rotation: Rotation | None, groups: list[Group]) -> torch.Tensor:
        if self.norm_first:
            x = x + self.attend(self.attention_norm(x) if self.attention_norm else x, rotation, groups)
            return x + self.feed_forward(self.mlp_norm(x))
        assert self.attention_norm is not None
        x = self.attention_norm(x + self.attend(x, rotation, groups))
        return self.mlp_norm(x + self.feed_forward(x))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x, gelu=True) if self.plain_gelu else self.activation(self.up(x)))

    def attend(self, x: torch.Tensor, rotation: Rotation | None, groups: list[Group]) -> torch.Tensor:
        """Attention of each text over itself: (tokens, hidden) from x (tokens, hidden)."""
        tokens, hidden = x.shape
        qkv = self.qkv(x).view(tokens, 3, self.heads, hidden // self.heads)
        if rotation is not None:
            turned = plain_layers.rotate(qkv[:, :2].flatten(1, 2), *rotation).view(tokens, 2, self.heads, -1)
            qkv = torch.cat((turned, qkv[:, 2:]), dim=1)
        mixed = torch.empty_like(x)
        for group in groups:
            rows = slice(group.start, group.start + group.texts * group.length)
            q, k, v = qkv[rows].view(group.texts, group.length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=near(self.window, group.length, x.device))
            mixed[rows] = out.transpose(1, 2).reshape(-1, hidden)  # (tokens of the group, hidden)
        return self.output(mixed)


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
        self.embedding_norm = LayerNorm(spec, weights, "embedding_norm")
        self.rotary = [(torch.tensor(rope.frequencies, device=self.device), rope.factor) for rope in spec.ropes]
        self.layers = [EncoderLayer(spec, weights, layer) for layer in range(len(spec.layers))]
        self.final_norm = LayerNorm(spec, weights, "final_norm") if spec.norm_first else None
        self.head = Head(spec.head, weights) if spec.head else None

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states of the last layer, in the batch's order: (tokens, hidden)."""
        order, groups = by_length(batch.starts)
        order = order.to(self.device)
        x = self.embed(batch)[order]
        rotations = [plain_layers.rotation(batch.positions[order], *rotary, self.dtype) for rotary in self.rotary]
        for layer in self.layers:
            x = layer(x, rotations[layer.rope] if rotations else None, groups)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return torch.empty_like(x).index_copy_(0, order, x)

    def embed(self, batch: Batch) -> torch.Tensor:
        """The sum of the tables' rows for each token, normed: (tokens, hidden)."""
        x = F.embedding(batch.input_ids, self.words)
        if batch.embeds is not None and batch.embeds_mask is not None:
            x = torch.where(batch.embeds_mask.unsqueeze(1), batch.embeds.to(x.dtype), x)
        if self.types is not None:
            x = x + (self.types[0] if batch.token_types is None else F.embedding(batch.token_types, self.types))
        if self.positions is not None:
            x = x + F.embedding(batch.positions + self.spec.first_position, self.positions)
        return self.embedding_norm(x)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError("an encoder predicts no next token")

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        raise NotImplementedError("an encoder predicts no next token")


def by_length(starts: torch.Tensor) -> tuple[torch.Tensor, list[Group]]:
    """The order that puts texts of one length side by side, as rows of the batch, and the groups in that order."""
    bounds = starts.tolist()
    texts = sorted(pairwise(bounds), key=lambda text: text[1] - text[0])
    order = torch.cat([torch.arange(start, end) for start, end in texts])
    groups: list[Group] = []
    row = 0
    for length, same in groupby(texts, key=lambda text: text[1] - text[0]):
        groups.append(Group(row, len(list(same)), length))
        row += groups[-1].texts * length
    return order, groups


def near(window: int | None, length: int, device: torch.device) -> torch.Tensor | None:
    """Which keys each query sees, (length, length); None where it sees all."""
    if window is None or length <= window + 1:
        return None
    at = torch.arange(length, device=device)
    return (at.unsqueeze(1) - at).abs() <= window
