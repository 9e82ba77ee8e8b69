"""The description of an encoder, as plain values: families write one of these, the generic encoder runs it."""

from dataclasses import dataclass

from quartet.scheduler_service.model.spec import HeadLayer, RopeSpec


@dataclass(frozen=True, slots=True)
class EncoderLayerSpec:
    """What one layer has of its own."""

    window: int | None = None  # a query at p sees keys in [p - window, p + window]
    rope: int = 0  # index into EncoderSpec.ropes
    attention_norm: bool = True


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
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"
    norm: tuple[str, str] = ("weight", "bias")  # the oldest checkpoints say gamma and beta


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """A bidirectional transformer of the BERT kind."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[EncoderLayerSpec, ...]
    heads: int
    norm_epsilon: float
    activation: str = "gelu"
    positions: int = 0  # rows of the table of positions; 0: there is none
    first_position: int = 0  # row of a text's first token
    token_types: int = 0  # rows of the table of token types; 0: there is none
    ropes: tuple[RopeSpec, ...] = ()
    norm_first: bool = False  # norms stand before attention and feed-forward, and one behind the last layer
    gated: bool = False  # activation(first half) * second half
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    names: EncoderNames = EncoderNames()
    prefix: str = ""  # of all names but the head's
    head: tuple[HeadLayer, ...] = ()
    ignored: frozenset[str] = frozenset()  # what a checkpoint may hold besides
