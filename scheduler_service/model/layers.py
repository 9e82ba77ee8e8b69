"""What the layers of a decoder are made of: weights and sizes. A backend (backend.py) computes with them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from quartet.kernels.cpu.linear import Linear
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.batch import AttentionSpec
from quartet.scheduler_service.model.sharded import GatheredLinear, ReducedLinear, look_up
from quartet.scheduler_service.model.spec import DecoderSpec, MoeSpec
from quartet.scheduler_service.weights.parameters import Weights

REDUCED = ("output", "down")  # where these buffers are cut, products are summed over the ranks
BY_TOKEN = ("embed", "lm_head")


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm over the last dimension."""

    weight: torch.Tensor  # (size,)
    epsilon: float
    plus_one: bool  # the weight is stored as its distance from one


@dataclass(frozen=True, slots=True)
class Attention:
    """Self-attention of one layer. The rows of `qkv` are queries, keys and values."""

    spec: AttentionSpec
    qkv: Linear
    output: Linear
    query_norm: Norm | None  # per head, before the rotation
    key_norm: Norm | None


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(activation(gate(x)) * up(x)), with gate and up in one matrix."""

    gate_up: Linear
    down: Linear
    activation: str


@dataclass(frozen=True, slots=True)
class Moe:
    """A mixture of experts: a router, the experts and, where the family has one, an expert that every token passes."""

    spec: MoeSpec
    router: Linear
    gate_up: list[Linear]  # by expert
    down: list[Linear]
    all_gate_up: torch.Tensor  # the same weights as one tensor (experts, 2 * size, hidden)
    all_down: torch.Tensor  # (experts, hidden, size)
    activation: str
    shared: Mlp | None
    shared_gate: Linear | None  # (1, hidden); its sigmoid scales what the shared expert gives
    parallel: Parallel | None = None  # the ranks whose results are summed; None: there is one


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer: attention, then a feed-forward block, with norms before and after each as the family has them."""

    index: int
    rope: int  # which of the model's rotations
    attention: Attention
    feed_forward: Mlp | Moe
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None


def linear(weights: Weights, buffer: str, *index: int, bias: bool = False) -> Linear:
    """The linear layer of a slab, kept in step with later updates of the weights."""
    quantized, weight = weights.quantized_slab(buffer, *index), weights.slab(buffer, *index)
    offsets = weights.slab(f"{buffer}_bias", *index) if bias else None
    if buffer in REDUCED and buffer in weights.layout.cut_buffers:
        layer: Linear = ReducedLinear(weight, offsets, quantized, weights.layout.parallel)
    elif buffer in BY_TOKEN and buffer in weights.layout.cut_buffers:
        layer = GatheredLinear(weight, quantized, weights.layout.parallel)
    else:
        layer = Linear(weight, offsets, quantized)
    weights.follow(layer, buffer, index)
    return layer


def embedding_of(weights: Weights) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What looks up rows of the embeddings: (ids (tokens,), table) → (tokens, hidden)."""
    if "embed" in weights.layout.cut_buffers:
        return partial(look_up, parallel=weights.layout.parallel)
    return F.embedding


def norm_of(spec: DecoderSpec, weights: Weights, buffer: str, *index: int) -> Norm:
    return Norm(weights.slab(buffer, *index), spec.norm_epsilon, spec.norm == "rms_plus_one")


def decoder_layer(spec: DecoderSpec, weights: Weights, index: int) -> DecoderLayer:
    """The layer of that index."""
    own = spec.layers[index]
    same_kind = [bool(before.moe) for before in spec.layers[:index]].count(bool(own.moe))
    mixture = moe(spec, own.moe, weights, same_kind) if own.moe else None

    def norm(place: str) -> Norm | None:
        return norm_of(spec, weights, place, index) if getattr(spec.names, place) else None

    return DecoderLayer(
        index=index,
        rope=own.rope,
        attention=attention(spec, weights, index),
        feed_forward=mixture or dense_mlp(spec, weights, same_kind),
        before_attention=norm("before_attention"),
        after_attention=norm("after_attention"),
        before_mlp=norm("before_mlp"),
        after_mlp=norm("after_mlp"),
    )


def attention(spec: DecoderSpec, weights: Weights, layer: int) -> Attention:
    """The attention of layer number `layer`."""
    return Attention(
        spec=AttentionSpec(
            layer=layer,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            scale=spec.attention_scale,
            window=spec.layers[layer].window,
            softcap=spec.attention_softcap,
            causal=spec.causal,
        ),
        qkv=linear(weights, "qkv", layer, bias=spec.qkv_bias),
        output=linear(weights, "output", layer, bias=spec.output_bias),
        query_norm=norm_of(spec, weights, "query_norm", layer) if spec.query_key_norm else None,
        key_norm=norm_of(spec, weights, "key_norm", layer) if spec.query_key_norm else None,
    )


def dense_mlp(spec: DecoderSpec, weights: Weights, slab: int) -> Mlp:
    gate_up = linear(weights, "gate_up", slab, bias=spec.mlp_bias)
    return Mlp(gate_up, linear(weights, "down", slab, bias=spec.mlp_bias), spec.activation)


def moe(spec: DecoderSpec, mixture: MoeSpec, weights: Weights, slab: int) -> Moe:
    """The mixture of experts in slab number `slab` of its weights."""
    expert = partial(linear, weights)
    has_shared = bool(mixture.shared_intermediate_size)
    return Moe(
        spec=mixture,
        router=linear(weights, "router", slab),
        gate_up=[expert("expert_gate_up", slab, number) for number in range(mixture.experts)],
        down=[expert("expert_down", slab, number) for number in range(mixture.experts)],
        all_gate_up=weights.slab("expert_gate_up", slab),
        all_down=weights.slab("expert_down", slab),
        activation=spec.activation,
        shared=shared_expert(spec, weights, slab) if has_shared else None,
        shared_gate=linear(weights, "shared_gate", slab) if has_shared else None,
        parallel=weights.layout.parallel if weights.layout.parallel.size > 1 else None,
    )


def shared_expert(spec: DecoderSpec, weights: Weights, slab: int) -> Mlp:
    return Mlp(linear(weights, "shared_gate_up", slab), linear(weights, "shared_down", slab), spec.activation)
