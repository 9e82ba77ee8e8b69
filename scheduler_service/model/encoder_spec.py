"""The description of an encoder, as plain values: families write one of these, the generic encoder runs it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from quartet.scheduler_service.model.spec import HeadLayer, RopeSpec


@dataclass(frozen=True, slots=True)
class EncoderLayerSpec:
    """What one layer has of its own."""

    window: int | None = None  # a query at p sees keys in [p - window, p + window]
    rope: int = 0  # index into EncoderSpec.ropes
    attention_norm: bool = True
    experts: bool = False  # the spec's mixture stands in the place of its feed-forward block


@dataclass(frozen=True, slots=True)
class EncoderMoe:
    """A mixture of experts; their weights are the shares that a softmax over all of them gives the chosen ones."""

    experts: int
    top_k: int
    router: str = "mlp.router.layer"  # names in the checkpoint, below a layer
    block: str = "mlp.experts"
    bias: str = "mlp.experts.bias"  # of their weighted sum


@dataclass(frozen=True, slots=True)
class DistanceBias:
    """A number for each head and each class of distance between two tokens, added to their score in all layers."""

    table: str = "encoder.relative_attention_bias"  # in the checkpoint
    classes: int = 32  # half of them for either direction
    farthest: int = 128  # tokens; beyond it all distances are of one class


@dataclass(frozen=True, slots=True, kw_only=True)
class DistanceVectors:
    """A vector for each class of distance, which each layer turns into keys and queries as it does with tokens."""

    table: str = "encoder.rel_embeddings"  # in the checkpoint
    norm: str = ""  # a layer norm over the table, in the checkpoint
    span: int  # classes in either direction
    farthest: int  # tokens; classes grow with the distance up to it
    grows: bool  # whether classes grow, or each distance within the span is its own
    keys: bool  # queries meet the distance's key
    queries: bool  # keys meet the distance's query

    @property
    def terms(self) -> int:
        """How many products make a score."""
        return 1 + self.keys + self.queries


@dataclass(frozen=True, slots=True)
class EncoderNames:
    """Checkpoint names: of the embeddings and the final norm, and below a layer."""

    words: str = "embeddings.word_embeddings"
    positions: str = "embeddings.position_embeddings"
    types: str = "embeddings.token_type_embeddings"
    embedding_norm: str = "embeddings.LayerNorm"
    final_norm: str = ""
    layer: str = "encoder.layer.{}."
    qkv: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: tuple[str, ...] = ("intermediate.dense",)
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"
    norm: tuple[str, str] = ("weight", "bias")  # the oldest checkpoints say gamma and beta
    weight: str = "weight"  # of tables and products


@dataclass(frozen=True, slots=True)
class WordHead:
    """From hidden states to a logit for each word of the vocabulary; the last matrix is that of the embeddings."""

    transform: HeadLayer
    bias: str  # in the checkpoint; "": there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """LoRA adapters that a model has for tasks: each changes the tables and all products of the layers."""

    tasks: tuple[str, ...]
    folders: tuple[str, ...] = ()  # by task, in peft's format; none: the checkpoint has all of them beside each weight
    names: EncoderNames = EncoderNames()  # in such folders
    rank: int
    scale: float  # of the product of two factors


class Product(NamedTuple):
    """A product of a layer: tensors of the checkpoint, one below the other."""

    buffer: str
    tensors: tuple[str, ...]  # one for all rows, or one for each number of them
    rows: tuple[int, ...]
    columns: int
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """A bidirectional transformer of the BERT kind."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[EncoderLayerSpec, ...]
    heads: int
    norm_epsilon: float
    kv_heads: int = 0  # 0: as many as heads
    activation: str = "gelu"
    positions: int = 0  # rows of the table of positions; 0: there is none
    first_position: int = 0  # row of a text's first token
    token_types: int = 0  # rows of the table of token types; 0: there is none
    ropes: tuple[RopeSpec, ...] = ()
    relative: DistanceBias | DistanceVectors | None = None
    norm: Literal["layer", "rms"] = "layer"
    embedding_norm: bool = True
    norm_first: bool = False  # norms stand before attention and feed-forward, and one behind the last layer
    gated: bool = False  # activation(first half) * second half
    moe: EncoderMoe | None = None  # of layers with experts
    gate_last: bool = False  # first half * activation(second half)
    head_by_head: bool = False  # one matrix has query, key and value of each head in turn; see HeadByHead
    attention_bias: bool = True
    up_bias: bool = True
    down_bias: bool = True
    norm_bias: bool = True
    names: EncoderNames = EncoderNames()
    prefix: str = ""  # of all names but the head's
    head: tuple[HeadLayer, ...] = ()
    word_head: WordHead | None = None
    tasks: TaskSpec | None = None
    ignored: frozenset[str] = frozenset()  # what a checkpoint may hold besides

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    def block_place(self, layer: int) -> int:
        """The number of a layer's feed-forward block, or mixture, among those of its kind."""
        return sum(before.experts == self.layers[layer].experts for before in self.layers[:layer])

    @property
    def tables(self) -> tuple[tuple[str, str, int], ...]:
        """Buffer, name and rows of each table of embeddings."""
        names = self.names
        tables = (
            ("words", names.words, self.vocab_size),
            ("positions", names.positions, self.positions),
            ("types", names.types, self.token_types),
        )
        return tuple(table for table in tables if table[2])

    def products(self, names: EncoderNames) -> tuple[Product, ...]:
        """Those of a layer, under these names."""
        hidden, size = self.hidden_size, self.intermediate_size
        key = (self.kv_heads or self.heads) * self.head_dim
        up = (size, size) if self.gated else (size,)
        return (
            Product("qkv", names.qkv, (hidden, key, key), hidden, self.attention_bias and not self.head_by_head),
            Product("output", (names.output,), (hidden,), hidden, self.attention_bias),
            Product("up", names.up, up, hidden, self.up_bias),
            Product("down", (names.down,), (hidden,), size, self.down_bias),
        )
