"""What the layers of a decoder are made of: weights and sizes. A backend (backend.py) computes with them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import NormalDist

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native.quantized import QuantizedWeight
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.batch import AttentionSpec
from quartet.scheduler_service.model.recurrent import Mixer, recurrent_mixer
from quartet.scheduler_service.model.sharded import GatheredLinear, ReducedLinear, look_up, rows_of
from quartet.scheduler_service.model.spec import DecoderSpec, LatentSpec, MoeSpec
from quartet.scheduler_service.weights.parameters import Weights, kind_of

REDUCED = ("output", "delta_out", "space_out", "conv_out", "down")  # where these are cut, ranks' products are summed
SUMMED = (*REDUCED, "expert_down")  # likewise, or what they are part of
BY_TOKEN = ("embed", "lm_head")
LATENT_EPSILON = 1e-6  # of the norms inside latent attention, whatever the config's is


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm over the last dimension, or a layer norm without bias."""

    weight: torch.Tensor  # (size,)
    epsilon: float
    plus_one: bool  # the weight is stored as its distance from one
    centred: bool = False  # the mean is subtracted first: a layer norm
    ranks: Parallel | None = None  # those that have a part each of what is normed together; None: it is all here


@dataclass(frozen=True, slots=True)
class Attention:
    """Self-attention of one layer. The rows of `qkv` are queries, keys and values.

    Where neighbours are rotated as pairs, `pair_order` has for each column of queries and keys the one that stands
    there for the rotation, which then finds its pairs half a head apart. Scores do not depend on the order of
    dimensions, so keys are kept like this, by every backend.
    """

    spec: AttentionSpec
    qkv: Linear
    output: Linear
    query_norm: Norm | None  # before the rotation
    key_norm: Norm | None
    output_gate: bool = False  # in `qkv` each head's query has its gate behind it
    norms_all_heads: bool = False  # these norms are over all heads together, else over each
    pair_order: torch.Tensor | None = None  # (heads + 2 * kv_heads) * head_dim, int64
    scales_queries: bool = False  # by their position, behind the rotation
    value_norm: Norm | None = None  # of each head
    values_from_keys: bool = False  # `qkv` has queries and keys; before their norm, keys are values too
    reads: bool = False  # `qkv` has queries alone; keys and values are those of the layer that `spec` names

    @property
    def is_plain(self) -> bool:
        """Whether kernels that norm heads and rotate halves do all that there is between the product and the scores."""
        others = self.norms_all_heads or self.value_norm or self.values_from_keys or self.reads
        return not others and self.pair_order is None


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Self-attention of one layer; `spec` has one head of keys, as wide as a latent vector and the rotated key."""

    spec: AttentionSpec
    latent: LatentSpec
    interleaved: bool  # neighbours are rotated as pairs
    query_down: Linear | None
    query_down_norm: Norm | None
    query: Linear
    kv_down: Linear
    kv_norm: Norm
    kv_up: torch.Tensor  # (heads * (plain_dim + value_dim), rank)
    output: Linear


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(activation(gate(x)) * up(x)), with gate and up in one matrix."""

    gate_up: Linear
    down: Linear
    activation: str
    cutoff: float | None = None  # gates below mean + cutoff * deviation count as zero, and others by the distance
    ranks: Parallel | None = None  # those that have a part each of the gates that have one cutoff; None: all are here


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
    score_bias: torch.Tensor | None = None  # (experts,) float32
    router_norm: Norm | None = None  # then the router reads the residual stream by this norm
    expert_scale: torch.Tensor | None = None  # (experts,)
    after: Norm | None = None  # of what the experts give together
    shared_before: Norm | None = None  # then the shared expert reads the residual stream by this norm
    shared_after: Norm | None = None
    ranks: Parallel | None = None  # those whose results are summed; None: there is one


@dataclass(frozen=True, slots=True)
class OwnInput:
    """What one layer has for its part of the inputs of all layers (layer_inputs.py)."""

    gate: Linear  # (size, hidden)
    projection: Linear  # (hidden, size)
    norm: Norm  # behind both
    activation: str


@dataclass(frozen=True, slots=True)
class OwnStreams:
    """What one layer has where it reads one of several residual streams (streams.py)."""

    active: int  # the one that is read
    router: Linear  # (count, hidden)
    router_norm: Norm
    predictions: torch.Tensor  # (count * count, count)
    corrections: torch.Tensor  # (count, count)
    scale: torch.Tensor | None  # (hidden,) of what the layer's own input is made of
    left: Linear  # (rank, hidden), of the product beside attention
    right: Linear  # (hidden, rank)
    norm: Norm  # behind both


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer: a mixer, then a feed-forward block, with norms before and after each as the family has them.

    The mixer, attention or a recurrence, lets tokens know of earlier ones.
    """

    index: int
    rope: int  # which of the model's rotations
    mixer: Attention | LatentAttention | Mixer | None
    feed_forward: Mlp | Moe | None
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    parallel: bool = False  # both blocks read the residual stream as it was
    beside: Mixer | None = None  # a recurrence that reads what the mixer reads
    own_input: OwnInput | None = None
    streams: OwnStreams | None = None
    scale: torch.Tensor | None = None  # (1,) of all that the layer leaves in the residual stream

    @property
    def attends(self) -> bool:
        return isinstance(self.mixer, Attention | LatentAttention)

    @property
    def keeps_kv(self) -> bool:
        """Whether it has keys and values of its own."""
        return self.attends and not (isinstance(self.mixer, Attention) and self.mixer.reads)

    @property
    def recurrence(self) -> Mixer | None:
        """The mixer that keeps a state, if there is one."""
        return self.beside if isinstance(self.mixer, Attention | LatentAttention) else self.mixer

    @property
    def attention(self) -> Attention | LatentAttention:
        """The mixer of a layer that attends."""
        assert isinstance(self.mixer, Attention | LatentAttention), self.index
        return self.mixer


def linear(weights: Weights, buffer: str, *index: int, bias: bool = False) -> Linear:
    """The linear layer of a slab, kept in step with later updates of the weights."""
    quantized, weight = weights.quantized_slab(buffer, *index), weights.slab(buffer, *index)
    parallel, is_cut = weights.layout.parallel, buffer in weights.layout.cut_buffers
    counts = parallel.rank == 0 or not (is_cut and kind_of(buffer) in SUMMED)  # the bias, where results are summed
    offsets = weights.slab(f"{buffer}_bias", *index) if bias and counts else None
    if is_cut and kind_of(buffer) in REDUCED:
        layer: Linear = ReducedLinear(weight, offsets, quantized, parallel)
    elif is_cut and buffer in BY_TOKEN:
        layer = GatheredLinear(weight, quantized, parallel)
    else:
        layer = Linear(weight, offsets, quantized)
    weights.follow(layer, buffer, index)
    return layer


def embedding_of(
    weights: Weights, buffer: str = "embed"
) -> Callable[[torch.Tensor, torch.Tensor | QuantizedWeight], torch.Tensor]:
    """What looks up rows of a table by token: (ids (tokens,), table) → (tokens, columns)."""
    if buffer in weights.layout.cut_buffers:
        return partial(look_up, parallel=weights.layout.parallel)
    return rows_of


def norm_of(spec: DecoderSpec, weights: Weights, buffer: str, *index: int) -> Norm:
    return Norm(weights.slab(buffer, *index), spec.norm_epsilon, spec.norm == "rms_plus_one", spec.norm == "layer")


def decoder_layer(spec: DecoderSpec, weights: Weights, index: int) -> DecoderLayer:
    """The layer of that index."""
    own, slabs, names = spec.layers[index], spec.slabs(index), spec.names_of(index)
    recurrence, block = None, None
    if own.recurrent is not None:
        recurrence = recurrent_mixer(own.recurrent, weights, index, slabs.recurrent, linear)
    attends = attention_of(spec, weights, index, slabs.attention) if own.attends else None
    if own.feeds:
        block = moe(spec, own.moe, weights, slabs.block) if own.moe else dense_mlp(spec, weights, index)

    def norm(place: str) -> Norm | None:
        is_there = own.feeds if place.endswith("mlp") else own.mixes
        return norm_of(spec, weights, place, index) if is_there and getattr(names, place) else None

    return DecoderLayer(
        index=index,
        rope=own.rope,
        mixer=attends or recurrence,
        feed_forward=block,
        before_attention=norm("before_attention"),
        after_attention=norm("after_attention"),
        before_mlp=norm("before_attention" if spec.parallel else "before_mlp"),
        after_mlp=norm("after_mlp"),
        parallel=spec.parallel,
        beside=recurrence if attends else None,
        own_input=own_input(spec, weights, index) if spec.layer_inputs else None,
        scale=weights.slab("layer_scale", index) if spec.layer_scales else None,
    )


def own_input(spec: DecoderSpec, weights: Weights, layer: int) -> OwnInput:
    """What layer number `layer` has for its part of the inputs."""
    return OwnInput(
        gate=linear(weights, "layer_gate", layer),
        projection=linear(weights, "layer_projection", layer),
        norm=norm_of(spec, weights, "after_layer_input", layer),
        activation=spec.activation,
    )


def attention_of(spec: DecoderSpec, weights: Weights, index: int, slab: int) -> Attention | LatentAttention:
    """The attention of layer number `index`, number `slab` among those with attention."""
    if spec.latent is not None:
        return latent_attention(spec, spec.latent, weights, index, slab)
    return attention(spec, weights, index, slab)


def attention(spec: DecoderSpec, weights: Weights, layer: int, slab: int) -> Attention:
    """The attention of layer number `layer`, number `slab` among those with attention."""
    own, kind = spec.layers[layer], spec.layers[layer].attention_kind
    rope, dim, kv_heads = spec.ropes[own.rope], spec.head_dim_of(layer), spec.kv_heads_of(layer)
    shape = spec.heads, kv_heads, dim, 2 * len(rope.frequencies)
    return Attention(
        spec=AttentionSpec(
            layer=layer if own.reads is None else own.reads,
            heads=spec.heads,
            kv_heads=kv_heads,
            head_dim=dim,
            scale=spec.attention_scale,
            window=own.window,
            chunk=own.chunk,
            softcap=spec.attention_softcap,
            causal=spec.causal,
            sinks=weights.slab(f"sinks{kind}", slab) if spec.sinks else None,
        ),
        qkv=linear(weights, f"qkv{kind}", slab, bias=spec.qkv_bias),
        output=linear(weights, f"output{kind}", slab, bias=spec.output_bias),
        query_norm=head_norm(spec, weights, f"query_norm{kind}", layer, slab),
        key_norm=head_norm(spec, weights, f"key_norm{kind}", layer, slab) if own.reads is None else None,
        output_gate=spec.output_gate,
        norms_all_heads=spec.query_key_norm and spec.query_key_norm_over == "heads",
        pair_order=pair_order(*shape, weights.device) if rope.interleaved else None,
        scales_queries=spec.query_scale is not None and not own.unscaled_queries,
        value_norm=bare_norm(spec, weights, dim) if spec.value_norm and own.reads is None else None,
        values_from_keys=own.values_from_keys,
        reads=own.reads is not None,
    )


def head_norm(spec: DecoderSpec, weights: Weights, buffer: str, layer: int, slab: int) -> Norm | None:
    """The norm of queries or keys, if there is one."""
    if spec.layers[layer].bare_norms:
        return bare_norm(spec, weights, spec.head_dim_of(layer))
    if not spec.query_key_norm:
        return None
    norm, parallel = norm_of(spec, weights, buffer, slab), weights.layout.parallel
    divided = spec.query_key_norm_over == "heads" and parallel.size > 1
    return replace(norm, ranks=parallel) if divided else norm


def bare_norm(spec: DecoderSpec, weights: Weights, size: int) -> Norm:
    """A norm without weights."""
    return Norm(torch.ones(size, dtype=weights.dtype, device=weights.device), spec.norm_epsilon, plus_one=False)


@cache
def pair_order(heads: int, kv_heads: int, head_dim: int, rotary_dim: int, device: torch.device) -> torch.Tensor:
    """See Attention.pair_order; columns of values stay where they are."""
    columns = torch.arange((heads + 2 * kv_heads) * head_dim).view(-1, head_dim)
    turned = columns[: heads + kv_heads, :rotary_dim].clone()
    half = rotary_dim // 2
    columns[: heads + kv_heads, :half] = turned[:, 0::2]
    columns[: heads + kv_heads, half:rotary_dim] = turned[:, 1::2]
    return columns.flatten().to(device)


def latent_attention(spec: DecoderSpec, latent: LatentSpec, weights: Weights, layer: int, slab: int) -> LatentAttention:
    """The attention of layer number `layer`, number `slab` among those with attention."""

    def norm(buffer: str) -> Norm:
        return Norm(weights.slab(buffer, slab), LATENT_EPSILON, plus_one=False)

    return LatentAttention(
        spec=AttentionSpec(
            layer=layer,
            heads=spec.heads,
            kv_heads=1,
            head_dim=spec.head_dim,
            scale=spec.attention_scale,
            values_are_keys=True,
        ),
        latent=latent,
        interleaved=spec.ropes[spec.layers[layer].rope].interleaved,
        query_down=linear(weights, "query_down", slab, bias=spec.qkv_bias) if latent.query_rank else None,
        query_down_norm=norm("query_down_norm") if latent.query_rank else None,
        query=linear(weights, "query", slab),
        kv_down=linear(weights, "kv_down", slab, bias=spec.qkv_bias),
        kv_norm=norm("kv_norm"),
        kv_up=weights.slab("kv_up", slab),
        output=linear(weights, "output", slab, bias=spec.output_bias),
    )


def dense_mlp(spec: DecoderSpec, weights: Weights, layer: int) -> Mlp:
    """The dense block of layer number `layer`."""
    own, slab = spec.layers[layer], spec.slabs(layer).block
    gate_up = linear(weights, f"gate_up{own.block_kind}", slab, bias=spec.mlp_bias)
    down = linear(weights, f"down{own.block_kind}", slab, bias=spec.mlp_bias)
    if not own.sparsity:
        return Mlp(gate_up, down, spec.activation)
    ranks = weights.layout.parallel if weights.layout.parallel.size > 1 else None
    return Mlp(gate_up, down, spec.activation, NormalDist().inv_cdf(own.sparsity), ranks)


def moe(spec: DecoderSpec, mixture: MoeSpec, weights: Weights, slab: int) -> Moe:
    """The mixture of experts in slab number `slab` of its weights."""
    expert = partial(linear, weights, bias=mixture.expert_bias)
    has_shared = bool(mixture.shared_intermediate_size)

    def norm(place: str, name: str | None) -> Norm | None:
        return norm_of(spec, weights, place, slab) if name else None

    return Moe(
        spec=mixture,
        router=linear(weights, "router", slab, bias=mixture.router_bias),
        gate_up=[expert("expert_gate_up", slab, number) for number in range(mixture.experts)],
        down=[expert("expert_down", slab, number) for number in range(mixture.experts)],
        all_gate_up=weights.slab("expert_gate_up", slab),
        all_down=weights.slab("expert_down", slab),
        activation=spec.activation,
        shared=shared_expert(spec, weights, slab) if has_shared else None,
        shared_gate=linear(weights, "shared_gate", slab) if has_shared and mixture.shared_gate else None,
        score_bias=weights.slab("score_bias", slab) if mixture.score_bias else None,
        router_norm=norm("router_norm", mixture.router_norm),
        expert_scale=weights.slab("expert_scale", slab) if mixture.expert_scale else None,
        after=norm("after_experts", mixture.after),
        shared_before=norm("before_shared", mixture.shared_before),
        shared_after=norm("after_shared", mixture.shared_after),
        ranks=weights.layout.parallel if weights.layout.parallel.size > 1 else None,
    )


def shared_expert(spec: DecoderSpec, weights: Weights, slab: int) -> Mlp:
    return Mlp(linear(weights, "shared_gate_up", slab), linear(weights, "shared_down", slab), spec.activation)
