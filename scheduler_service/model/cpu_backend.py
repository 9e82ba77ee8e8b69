"""The operations of a decoder on our own CPU kernels, in bfloat16; torch's where there is none for a shape or kind.

    run_layers    all layers in one call, where there is a kernel for everything that they do; else
    attend        norm + QKV product, head norms + rotation + writing of keys and values, attention
    add_product   product, norm and residual
    gate_up       norm + product + gate
    add_experts   norm, router, experts and residual

A row's bits do not depend on the rows beside it in any of these kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast

import torch

from quartet.kernels.cpu.experts import Experts, ExpertsArgument
from quartet.kernels.cpu.gating import gated
from quartet.kernels.cpu.layer_parts import OwnInput, OwnStreams
from quartet.kernels.cpu.layers import Layer, Layers, Mlp
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.norm import can_norm, normed
from quartet.scheduler_service.model import layers as model_layers
from quartet.scheduler_service.model.backend import Rotation
from quartet.scheduler_service.model.batch import Attend, PagedAttend, PagedContext
from quartet.scheduler_service.model.kept_rotations import KeptRotations
from quartet.scheduler_service.model.layers import Attention, DecoderLayer, Moe, Norm
from quartet.scheduler_service.model.projections import arranged
from quartet.scheduler_service.model.spec import RopeSpec
from quartet.scheduler_service.model.torch_backend import TorchBackend
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows

GATES = {"silu": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class CpuBackend:
    """A model.backend.Backend whose contexts are functions (model.batch.Attend), best such as PagedAttend."""

    def __init__(self, ropes: Sequence[RopeSpec], deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.torch = TorchBackend(ropes, torch.bfloat16, torch.device("cpu"), deterministic)
        self.rotary_dims = [2 * len(rope.frequencies) for rope in ropes]
        self.kept_rotations = KeptRotations(self.torch.rotations)
        self.together: Layers | None = None  # the layers of a model, if they can be computed in one call
        self.looked_at: list[DecoderLayer] | None = None  # those layers
        self.experts: dict[
            int, tuple[Moe, ExpertsArgument | None]
        ] = {}  # by id of the mixture; None: torch computes it

    def reserve(self, layers: list[DecoderLayer], lm_head: Linear | None) -> None:
        """Nothing: the kernels keep what they need."""

    def run_layers(
        self,
        layers: list[DecoderLayer],
        residual: torch.Tensor,
        rotations: list[Rotation],
        context: Attend | PagedContext,
        inputs: torch.Tensor | None = None,
        stack: torch.Tensor | None = None,
        final: Norm | None = None,
    ) -> torch.Tensor | None:
        """As the protocol has it: where the context attends with our kernel, and this knows all of the layers."""
        if self.looked_at is not layers:  # not before: the kernels may be compiled beside the start
            self.looked_at, self.together = layers, layers_together(layers, self.rotary_dims)
        if self.together is None or not hasattr(context, "page_table"):
            return None
        paged = cast(PagedAttend, context)
        if (table := paged.page_table()) is None:
            return None
        which = paged.begin_pages()
        pools = lambda: [paged.pools(layer.attention.spec.layer) for layer in layers]  # noqa: E731 (several may read one)
        has_kernel = final is not None and not final.centred and final.ranks is None
        own, wanted = norm_weight(final) if has_kernel else None, paged.wanted
        found = self.together.run(residual, rotations, paged.places, table, pools, which, inputs, stack, wanted, own)
        return found if has_kernel else self.normed(found, final)

    def watch_rows(self, on_rows: Callable[[torch.Tensor | None], None]) -> None:
        """As TorchBackend: our own kernels know the rows by themselves."""
        self.torch.watch_rows(on_rows)

    def rotations(self, positions: torch.Tensor) -> list[Rotation]:
        """As the protocol has it."""
        return self.kept_rotations.at(int(positions)) if len(positions) == 1 else self.torch.rotations(positions)

    def normed(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """As TorchBackend, by our own kernel where it knows the norm, which takes one row less time."""
        kernels = native.at_hand()
        if kernels is None or norm is None or norm.centred or norm.ranks is not None or not can_norm(x):
            return self.torch.normed(x, norm)
        return normed(kernels, x, cast(native.NormWeight, norm_weight(norm)))

    def attend(
        self,
        residual: torch.Tensor,
        norm: Norm | None,
        attention: Attention,
        rotation: Rotation,
        context: Attend | PagedContext,
        query_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the protocol has it: three calls of our kernels, or torch where one of them cannot do it."""
        if not (attention.qkv.is_native and can_rotate(attention, rotation) and hasattr(context, "pools")):
            return self.torch.attend(residual, norm, attention, rotation, context, query_scale)
        residual, norm = self.without_centring(residual, norm)
        qkv = residual.new_empty(len(residual), len(attention.qkv.weight))
        attention.qkv.multiply_native(residual, qkv, "bf16", norm=norm_weight(norm))
        return attend_projected(qkv, attention, rotation, cast(PagedAttend, context), query_scale, self.normed)

    def without_centring(self, x: torch.Tensor, norm: Norm | None) -> tuple[torch.Tensor, Norm | None]:
        """x and its norm, as products with a norm before them take both: they know root-mean-square norms alone."""
        return (self.normed(x, norm), None) if norm is not None and norm.centred else (x, norm)

    def add_product(self, residual: torch.Tensor, x: torch.Tensor, linear: Linear, norm: Norm | None) -> None:
        """As the protocol has it."""
        if not linear.is_native:
            self.torch.add_product(residual, x, linear, norm)
        elif norm is None:
            linear.multiply_native(x, residual, "add")
        else:
            kernels = native.library()
            assert kernels is not None
            kernels.add_normed(linear(x), cast(native.NormWeight, norm_weight(norm)), residual)

    def gate_up(self, residual: torch.Tensor, norm: Norm | None, gate_up: Linear, activation: str) -> torch.Tensor:
        size = len(gate_up.weight)
        if not (gate_up.is_native and activation in GATES and native.can_gate(size)):
            return self.torch.gate_up(residual, norm, gate_up, activation)
        residual, norm = self.without_centring(residual, norm)
        out = residual.new_empty(len(residual), size // 2)
        gate_up.multiply_native(residual, out, "gated", GATES[activation], norm_weight(norm))
        return out

    def gated(self, gate: torch.Tensor, factor: torch.Tensor, activation: str) -> torch.Tensor:
        kernels = native.library()
        if kernels is None or activation not in GATES:
            return self.torch.gated(gate, factor, activation)
        return gated(kernels, gate, factor, GATES[activation])

    def add_experts(self, residual: torch.Tensor, before: Norm | None, moe: Moe, after: Norm | None) -> torch.Tensor:
        argument = self.experts_argument(before, moe, after)
        if argument is None:
            return self.torch.add_experts(residual, before, moe, after)
        kernels = native.library()
        assert kernels is not None
        return argument.add(kernels, residual)

    def experts_argument(self, before: Norm | None, moe: Moe, after: Norm | None) -> ExpertsArgument | None:
        """A mixture as the kernels take it, made once; None where they do not know it."""
        if id(moe) not in self.experts:
            described = described_experts(before, moe, after)
            known = described is not None and described.can_run()
            self.experts[id(moe)] = moe, ExpertsArgument(described) if known and described is not None else None
        return self.experts[id(moe)][1]

    def write_logits(
        self, hidden: torch.Tensor, lm_head: Linear, scale: float, softcap: float | None, out: torch.Tensor
    ) -> None:
        self.torch.write_logits(hidden, lm_head, scale, softcap, out)

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        return self.torch.sample(logits, rows, allowed, keep_logits)


def can_rotate(attention: Attention, rotation: Rotation) -> bool:
    """Whether `attend_projected` knows this attention."""
    kernels = native.library()
    rotates = kernels is not None and kernels.can_rotate(attention.spec.head_dim, rotation[0].shape[-1])
    return rotates and not attention.output_gate


def attend_projected(
    qkv: torch.Tensor,
    attention: Attention,
    rotation: Rotation,
    paged: PagedAttend,
    query_scale: torch.Tensor | None,
    normed: Callable[[torch.Tensor, Norm | None], torch.Tensor],
) -> torch.Tensor:
    """Attention of what was projected, (tokens, (heads + 2 * kv_heads) * dim): a kernel norms the heads, rotates and
    writes keys and values, another one attends. Where heads are normed or clipped otherwise, `normed` is used before.
    """
    spec, kernels = attention.spec, native.library()
    assert kernels is not None, "see can_rotate"
    query_norm, key_norm, value_norm = (norm_weight(norm) for norm in head_norms(attention))
    from_keys = attention.values_from_keys
    if attention.norms_all_heads or attention.pair_order is not None:
        qkv, query_norm, key_norm, value_norm, from_keys = arranged(qkv, attention, normed), None, None, None, False
    q = qkv.new_empty(len(qkv), spec.heads, spec.head_dim)
    # `pools` clears pages for those who write to them
    none = qkv.new_empty(0, 0, spec.head_dim)
    keys, values = (none, none) if attention.reads else paged.pools(spec.layer)
    kernels.rotate(qkv, query_norm, key_norm, *rotation, paged.places, keys, values, q, value_norm, from_keys)
    if query_scale is not None:
        q.mul_(query_scale.to(q.dtype))
    return paged.attend_written(spec, q).view(len(qkv), -1)


def layers_together(layers: list[DecoderLayer], rotary_dims: Sequence[int]) -> Layers | None:
    """The layers as one call computes them; None where one of them does something that it cannot."""
    kernels = native.library()
    described = [described_layer(layer) for layer in layers]
    known = [layer for layer in described if layer is not None]
    if kernels is None or len(known) < len(layers):
        return None
    if not all(layer.can_run(kernels, rotary_dims[layer.rope]) for layer in known):
        return None
    return Layers(kernels, known, rotary_dims)


def described_layer(layer: DecoderLayer) -> Layer | None:
    """A layer as the kernels know it; None where they have no such thing."""
    attention = layer.mixer
    if not isinstance(attention, Attention) or not (attention.output.is_whole and is_known(layer)):
        return None
    if (feed_forward := described_feed_forward(layer)) is None:
        return None
    spec, own_input, streams = attention.spec, layer.own_input, layer.streams
    return Layer(
        qkv=attention.qkv,
        output=attention.output,
        feed_forward=feed_forward,
        before_attention=norm_weight(layer.before_attention),
        after_attention=norm_weight(layer.after_attention),
        query_norm=norm_weight(attention.query_norm),
        key_norm=norm_weight(attention.key_norm),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        causal=spec.causal,
        rope=layer.rope,
        value_norm=norm_weight(attention.value_norm),
        values_from_keys=attention.values_from_keys,
        reads=attention.reads,
        own_input=None if own_input is None else described_input(own_input),
        streams=None if streams is None else described_streams(streams, layer.before_attention),
        output_scale=layer.scale,
    )


def described_input(own: model_layers.OwnInput) -> OwnInput:
    """The same of what a layer has for its own input."""
    norm = cast(native.NormWeight, norm_weight(own.norm))
    return OwnInput(own.gate, own.projection, norm, GATES.get(own.activation, ""))


def described_streams(own: model_layers.OwnStreams, before: Norm | None) -> OwnStreams:
    """The same of what a layer has for several residual streams; `before` is the norm before attention."""
    norms = (cast(native.NormWeight, norm_weight(norm)) for norm in (own.router_norm, before, own.norm))
    router_norm, before_left, after = norms
    return OwnStreams(
        count=len(own.router.weight),
        active=own.active,
        router=own.router,
        router_norm=router_norm,
        predictions=own.predictions,
        corrections=own.corrections,
        scale=own.scale,
        before=before_left,
        left=own.left,
        right=own.right,
        after=after,
    )


def described_feed_forward(layer: DecoderLayer) -> Mlp | Experts | None:
    """The same of a layer's feed-forward block."""
    before, after = layer.before_mlp, layer.after_mlp
    match layer.feed_forward:
        case Moe() as moe:
            return described_experts(before, moe, after)
        case None:
            return None
        case block:
            activation = GATES.get(block.activation, "")
            return Mlp(block.gate_up, block.down, norm_weight(before), norm_weight(after), activation, block.cutoff)


def described_experts(before: Norm | None, moe: Moe, after: Norm | None) -> Experts | None:
    """The same of a mixture of experts."""
    if not (has_only(moe, MOE) and has_only(moe.spec, MOE_SPEC)):
        return None
    if moe.shared is not None and moe.shared.activation != moe.activation:
        return None
    return Experts(
        before=norm_weight(before),
        after=norm_weight(after),
        router=moe.router,
        gate_up=moe.gate_up,
        down=moe.down,
        shared=None if moe.shared is None else (moe.shared.gate_up, moe.shared.down),
        activation=GATES.get(moe.activation, ""),
        top_k=moe.spec.top_k,
        renormalize=moe.spec.renormalize,
        shared_gate=moe.shared_gate,
        router_norm=norm_weight(moe.router_norm),
        router_scale=moe.spec.router_scale,
        expert_scale=moe.expert_scale,
        after_chosen=norm_weight(moe.after),
        shared_before=norm_weight(moe.shared_before),
        shared_after=norm_weight(moe.shared_after),
    )


# What the kernels know: fields that are not here must be unset, whoever adds them.
LAYER = {
    "index",
    "rope",
    "mixer",
    "feed_forward",
    "before_attention",
    "after_attention",
    "before_mlp",
    "after_mlp",
    "own_input",
    "streams",
    "scale",
}
HEADS = {"query_norm", "key_norm", "value_norm", "values_from_keys", "reads"}
ATTENTION = {"spec", "qkv", "output", *HEADS}
ATTENTION_SPEC = {"layer", "heads", "kv_heads", "head_dim", "scale", "window", "softcap", "causal"}
OWN_INPUT = {"gate", "projection", "norm", "activation"}
NORM = {"weight", "epsilon", "plus_one"}
STREAMS = {"active", "router", "router_norm", "predictions", "corrections", "scale", "left", "right", "norm"}
MLP = {"gate_up", "down", "activation", "cutoff"}
MOE_NORMS = {"router_norm", "after", "shared_before", "shared_after"}
MOE = {
    *("spec", "router", "gate_up", "down", "all_gate_up", "all_down", "activation", "shared", "shared_gate"),
    *("expert_scale", *MOE_NORMS),
}
MOE_SPEC = {
    "experts",
    "top_k",
    "intermediate_size",
    "renormalize",
    "shared_intermediate_size",
    "block",
    "router",
    "gate_up",
    "down",
    "shared",
    "shared_gate_up",
    "shared_down",
    "router_scale",
    "expert_scale",
    *MOE_NORMS,
}


def is_known(layer: DecoderLayer) -> bool:
    """Whether the one call knows all that a layer is made of."""
    return (
        layer.attends
        and layer.feed_forward is not None
        and has_only(layer, LAYER)
        and has_only(layer.attention, ATTENTION)
        and has_only(layer.attention.spec, ATTENTION_SPEC)
        and (isinstance(layer.feed_forward, Moe) or has_only(layer.feed_forward, MLP))
        and (layer.own_input is None or has_only(layer.own_input, OWN_INPUT))
        and (layer.streams is None or has_only(layer.streams, STREAMS))
        and (layer.streams is None or layer.before_attention is not None)
        and all(has_only(norm, NORM) for norm in norms_of(layer) if norm is not None)
    )


def norms_of(layer: DecoderLayer) -> list[Norm | None]:
    attention = layer.attention
    assert isinstance(attention, Attention), attention
    around = [layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp]
    own = [] if layer.own_input is None else [layer.own_input.norm]
    streams = [] if layer.streams is None else [layer.streams.router_norm, layer.streams.norm]
    return [*around, *head_norms(attention), *own, *streams]


def head_norms(attention: Attention) -> list[Norm | None]:
    """Of queries, keys and values."""
    return [attention.query_norm, attention.key_norm, attention.value_norm]


def has_only(value: Any, known: set[str]) -> bool:
    """Whether all other fields of a dataclass are as good as absent: None, False or their default."""
    others = [(getattr(value, field.name), field.default) for field in fields(value) if field.name not in known]
    return all(
        own is None or own is False or (not isinstance(own, torch.Tensor) and own == default) for own, default in others
    )


def norm_weight(norm: Norm | None) -> native.NormWeight | None:
    """A norm as the kernels take it."""
    assert norm is None or not norm.centred, "kernels have no layer norm"
    return None if norm is None else (norm.weight, norm.epsilon, float(norm.plus_one))
