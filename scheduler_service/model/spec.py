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


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A layer's mixture of experts."""

    experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool  # the chosen experts' weights sum to one
    shared_intermediate_size: int = 0  # one expert that every token passes, scaled by a sigmoid gate
    block: str = "mlp"  # checkpoint names below the layer
    gate_up: tuple[str, str] = ("gate_proj", "up_proj")
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer has of its own."""

    window: int | None = None  # a query at p sees keys in (p - window, p]
    rope: int = 0  # index into DecoderSpec.ropes
    moe: MoeSpec | None = None  # None: a dense feed-forward block
    recurrent: RecurrentSpec | None = None  # in place of attention


@dataclass(frozen=True, slots=True)
class Names:
    """Checkpoint names that differ between families, below `model.layers.N.`."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayer:
    """norm(activation(x @ weight.T + bias)), each part where the layer has it."""

    name: str  # in the checkpoint
    inputs: int
    outputs: int
    bias: bool = True
    activation: str | None = None
    norm: str | None = None  # in the checkpoint: a layer norm behind the activation
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
    norm: Literal["rms", "rms_plus_one"] = "rms"
    output_gate: bool = False  # each head's query comes with a gate, whose sigmoid scales what the head gives
    query_key_norm: bool = False  # per head, before rope
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied: bool = False
    names: Names = field(default_factory=Names)
    prefix: str = "model."  # of all names but the heads'
    generates: bool = True  # it has a language-model head; embedders go without
    causal: bool = True
    score_head: tuple[HeadLayer, ...] = ()

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers keep a state instead of keys and values."""
        return any(layer.recurrent for layer in self.layers)


def require(config: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise NotNative where a config sets a switch that the family does not know how to follow."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise NotNative(f"{name}={config[name]!r}")
