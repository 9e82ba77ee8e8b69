"""The description of a decoder, as plain values: families write one of these, the generic decoder runs it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from quartet.scheduler_service.model.recurrent import RecurrentSpec


class NotNative(Exception):
    """This config asks for something the generic decoder does not do; transformers' own model may run it."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One way of turning queries and keys by position."""

    frequencies: tuple[float, ...]  # radians per position, one for each pair of dimensions
    factor: float = 1.0  # multiplies cosines and sines
    interleaved: bool = False  # neighbours (2i, 2i + 1) are pairs, else (i, i + rotary_dim / 2)


@dataclass(frozen=True, slots=True)
class QueryScale:
    """Queries grow with their position: times 1 + beta * log(1 + floor((position + first) / length))."""

    beta: float
    length: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Keys and values of all heads are made of one latent vector per token, which is what the pool keeps."""

    rank: int  # of the latent vector
    query_rank: int | None  # of what queries are made of; None: of the hidden state
    plain_dim: int  # dimensions of a head's queries and keys that are not rotated
    rotated_dim: int  # and that are; their keys are the same for all heads
    value_dim: int


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A layer's mixture of experts."""

    experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool  # the chosen experts' weights sum to one
    scoring: Literal["softmax", "sigmoid"] = "softmax"  # from a router's logits to scores
    score_bias: str | None = None  # checkpoint name below the block: added to scores for the choice, not to weights
    router_norm: str | None = (
        None  # checkpoint name below the block: the router reads the residual stream, normed by it
    )
    router_scale: float = 1.0  # of the router's logits
    expert_scale: str | None = None  # checkpoint name below the block: a factor of each expert's weight
    groups: int = 1  # of neighbouring experts; only those of the best groups can be chosen
    top_groups: int = 1
    group_best: int = 2  # so many of a group's best experts, added up, say how good it is
    scale: float = 1.0  # of the chosen experts' weights
    scales_inputs: bool = False  # these are multiplied with what an expert reads, not with what it gives
    router_bias: bool = False
    expert_bias: bool = False
    shared_intermediate_size: int = 0  # one expert that every token passes
    shared_gate: bool = True  # a sigmoid scales it
    ungated: bool = False  # experts are down(activation(up)), else down(activation(gate) * up)
    block: str = "mlp"  # checkpoint names below the layer
    router: str = "gate"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    shared: str = "shared_expert"  # below the block; with a dot in front, below the layer
    shared_gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    shared_down: str = "down_proj"
    after: str | None = None  # checkpoint names below the layer of norms: behind the experts' sum,
    shared_before: str | None = None  # in front of the shared expert, which reads the residual stream then,
    shared_after: str | None = None  # and behind it

    @property
    def chooses_plainly(self) -> bool:
        """Whether the experts are those with the largest logits, weighed by a softmax alone."""
        others = self.score_bias or self.router_norm or self.expert_scale
        return self.scoring == "softmax" and not others and self.groups == 1 and self.scale == 1.0


@dataclass(frozen=True, slots=True)
class Names:
    """Checkpoint names that differ between families, below `model.layers.N.`."""

    embeddings: str = "embed_tokens"  # below `prefix`
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    mlp: str = "mlp"
    output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    norm: str = "norm"  # the final one, below `prefix`
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer has of its own."""

    window: int | None = None  # a query at p sees keys in (p - window, p]
    chunk: int | None = None  # a query sees keys in its own chunk of so many positions
    bare_norms: bool = False  # queries and keys of each head are normed without weights
    unscaled_queries: bool = False  # DecoderSpec.query_scale is not for this layer
    rope: int = 0  # index into DecoderSpec.ropes
    moe: MoeSpec | None = None  # None: a dense feed-forward block
    recurrent: RecurrentSpec | None = None  # in place of attention
    beside: bool = False  # the recurrence runs beside attention: both read the same and are added
    head_dim: int | None = None  # in place of the model's, as the next two
    kv_heads: int | None = None
    intermediate_size: int | None = None
    reads: int | None = None  # the layer whose keys and values this one attends to; it has none of its own
    values_from_keys: bool = False  # values are made of what keys are made of
    sparsity: float = 0.0  # so much of a dense block's gates would be zero, if they were distributed normally
    mixes: bool = True  # it has attention, a recurrence or both
    feeds: bool = True  # it has a feed-forward block
    names: Names | None = None  # in place of the model's

    @property
    def attends(self) -> bool:
        return self.mixes and (self.recurrent is None or self.beside)

    @property
    def attention_kind(self) -> str:
        """What stands behind the names of attention's buffers: layers whose matrices differ in shape have others."""
        found = (self.head_dim, self.kv_heads, self.reads is not None and "reads", self.values_from_keys and "shared")
        return "".join(f":{part or ''}" for part in found) if any(found) else ""

    @property
    def block_kind(self) -> str:
        """The same for dense feed-forward blocks."""
        return f":{self.intermediate_size}" if self.intermediate_size else ""

    @property
    def is_plain(self) -> bool:
        """Whether it is attention of the model's sizes with a feed-forward block behind it."""
        whole = self.attends and self.feeds and not (self.recurrent or self.chunk or self.sparsity)
        return whole and not (self.attention_kind or self.block_kind)


@dataclass(frozen=True, slots=True)
class LayerInputSpec:
    """A second embedding of each token has a part for every layer, which adds what it makes of it to its result."""

    size: int  # of a part
    vocabulary: int  # tokens of the second table; all others have the part of the first


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """Layers read one of several residual streams: they predict all of them before, and correct them behind (AltUp).

    Beside attention stands a product of low rank (Laurel).
    """

    count: int
    active: int  # the one that is read
    scaled: bool  # what a layer's own input is added to has a scale for each column
    rank: int  # of the product beside attention


@dataclass(frozen=True, slots=True)
class Factors:
    """What parts of every layer are multiplied with."""

    attention: float = 1.0  # what the output product reads
    gate: float = 1.0  # gates, before their activation
    down: float = 1.0  # what the down product reads


@dataclass(frozen=True, slots=True)
class Slabs:
    """The numbers of a layer's parts among those of their kind and size in other layers."""

    attention: int
    recurrent: int
    block: int  # among dense feed-forward blocks, or among mixtures


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayer:
    """norm(activation(x @ weight.T + bias)), each part where the layer has it."""

    name: str  # in the checkpoint
    inputs: int
    outputs: int
    bias: bool = True
    activation: str | None = None
    norm: str | None = None  # in the checkpoint: a layer norm behind the activation
    norm_names: tuple[str, str] = ("weight", "bias")  # of its tensors, in the checkpoint
    norm_bias: bool = False
    norm_epsilon: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A causal decoder of the Llama kind."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    heads: int
    kv_heads: int
    head_dim: int
    attention_scale: float
    ropes: tuple[RopeSpec, ...]
    norm_epsilon: float
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"  # a layer norm has no bias
    parallel: bool = False  # the feed-forward block reads what attention reads, by one norm, and both are added
    output_gate: bool = False  # each head's query comes with a gate, whose sigmoid scales what the head gives
    query_key_norm: bool = False  # before rope
    query_key_norm_over: Literal["head", "heads"] = "head"  # one head, or all heads together
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    ungated: bool = False  # dense blocks are down(activation(up)), else down(activation(gate) * up)
    activation: str = "silu"
    factors: Factors | None = None
    embedding_scale: float = 1.0
    rounds_embedding_scale: bool = False  # to the dtype of activations
    scales_given_embeddings: bool = False  # those that a request brings are scaled too
    query_scale: QueryScale | None = None
    latent: LatentSpec | None = None  # then there is one head of keys, `rank + rotated_dim` wide
    value_norm: bool = False  # values of each head are normed, without weights
    layer_scales: bool = False  # what a layer leaves in the residual stream is multiplied with a number of its own
    layer_inputs: LayerInputSpec | None = None
    streams: StreamSpec | None = None
    sinks: bool = False  # a score for each head that takes a share of attention and gives nothing
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0  # before the cap
    tied: bool = False
    names: Names = field(default_factory=Names)
    prefix: str = "model."  # of all names but the heads'
    head: str = "lm_head.weight"  # the language-model head's name
    ignored: frozenset[str] = frozenset()  # what a checkpoint may hold besides
    extra_layers: int = 0  # behind the last one, which a checkpoint may hold: they predict tokens beyond the next
    generates: bool = True  # it has a language-model head; embedders go without
    causal: bool = True
    score_head: tuple[HeadLayer, ...] = ()

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers keep a state instead of keys and values."""
        return any(layer.recurrent for layer in self.layers)

    @property
    def is_plain(self) -> bool:
        """Whether every layer is attention with a feed-forward block behind it, and nothing is multiplied."""
        others = self.factors or self.layer_inputs or self.streams or self.layer_scales or self.value_norm
        return not others and all(layer.is_plain for layer in self.layers)

    def head_dim_of(self, layer: int) -> int:
        return self.layers[layer].head_dim or self.head_dim

    def kv_heads_of(self, layer: int) -> int:
        return self.layers[layer].kv_heads or self.kv_heads

    def names_of(self, layer: int) -> Names:
        return self.layers[layer].names or self.names

    def slabs(self, layer: int) -> Slabs:
        """Where a layer's parts are in the buffers of their kind."""
        own, before = self.layers[layer], self.layers[:layer]
        return Slabs(
            attention=sum(other.attends and other.attention_kind == own.attention_kind for other in before),
            recurrent=sum(other.recurrent is not None for other in before),
            block=sum(other.feeds and block_of(other) == block_of(own) for other in before),
        )


def block_of(layer: LayerSpec) -> tuple[bool, str]:
    """Feed-forward blocks with the same are numbered together."""
    return layer.moe is not None, "" if layer.moe else layer.block_kind


def require(config: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise NotNative where a config sets a switch that the family does not know how to follow."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise NotNative(f"{name}={config[name]!r}")
