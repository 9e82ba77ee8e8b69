"""From a decoder's spec to the layout of its weights: which checkpoint tensors exist and where each one lives."""

import torch

from quartet.scheduler_service.model.heads import add_head
from quartet.scheduler_service.model.latent import add_latent
from quartet.scheduler_service.model.recurrent import add_recurrent
from quartet.scheduler_service.model.spec import DecoderSpec, MoeSpec
from quartet.scheduler_service.weights.parameters import Layout


def decoder_layout(spec: DecoderSpec, vocabulary: int | None = None) -> Layout:
    """Buffers by kind, fused where layers read them together: qkv, and gate with up.

    `vocabulary`: how many tokens embeddings and head have here; None: all.
    """
    tokens = spec.vocab_size if vocabulary is None else vocabulary
    own_lm_head = spec.generates and not spec.tied
    layout = Layout(ignored=spec.ignored | frozenset(() if own_lm_head else {spec.head}))
    if spec.generates:
        layout.ties[spec.head] = embeddings_name(spec)
    layout.add("embed", (), [(embeddings_name(spec), tokens)], spec.hidden_size)
    layout.add("norm", (), [(f"{spec.prefix}{spec.names.norm}.weight", spec.hidden_size)], None)
    add_head(layout, spec.score_head)
    if own_lm_head:
        layout.add("lm_head", (), [(spec.head, tokens)], spec.hidden_size)
    for index, layer in enumerate(spec.layers):
        prefix, slabs, names = f"{spec.prefix}layers.{index}.", spec.slabs(index), spec.names_of(index)
        if layer.recurrent:
            add_recurrent(layout, layer.recurrent, spec.hidden_size, slabs.recurrent, prefix)
        if layer.attends:
            add_attention(layout, spec, slabs.attention, f"{prefix}{names.attention}.")
        add_norms(layout, spec, index, prefix)
        if layer.feeds and layer.moe:
            add_moe(layout, spec, layer.moe, slabs.block, prefix)
        elif layer.feeds:
            add_mlp(layout, spec, slabs.block, f"{prefix}{names.mlp}.")
    return layout


def embeddings_name(spec: DecoderSpec) -> str:
    return f"{spec.prefix}{spec.names.embeddings}.weight"


def parts(prefix: str, names: tuple[str, ...], rows: tuple[int, ...], kind: str = "weight") -> list[tuple[str, int]]:
    """(name, rows) of fused tensors; a family that fuses them in the checkpoint has one name for all rows."""
    sizes = rows if len(names) == len(rows) else (sum(rows),)
    return [(f"{prefix}{name}.{kind}", size) for name, size in zip(names, sizes, strict=True)]


def add_attention(layout: Layout, spec: DecoderSpec, layer: int, prefix: str) -> None:
    """Places for the projections, biases and norms of one layer's attention; `layer`: its number among such layers."""
    if spec.latent is not None:
        add_latent(layout, spec, spec.latent, layer, prefix)
        return
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    rows = (2 * query if spec.output_gate else query, key, key)
    layout.add("qkv", (layer,), parts(prefix, spec.names.qkv, rows), spec.hidden_size)
    layout.add("output", (layer,), [(f"{prefix}{spec.names.output}.weight", spec.hidden_size)], query)
    if spec.qkv_bias:
        layout.add("qkv_bias", (layer,), parts(prefix, spec.names.qkv, rows, "bias"), None)
    if spec.output_bias:
        layout.add("output_bias", (layer,), [(f"{prefix}{spec.names.output}.bias", spec.hidden_size)], None)
    if spec.query_key_norm:
        per_head = spec.query_key_norm_over == "head"
        sizes = (spec.head_dim, spec.head_dim) if per_head else (query, key)
        layout.add("query_norm", (layer,), [(f"{prefix}{spec.names.query_norm}.weight", sizes[0])], None)
        layout.add("key_norm", (layer,), [(f"{prefix}{spec.names.key_norm}.weight", sizes[1])], None)
    if spec.sinks:
        layout.add("sinks", (layer,), [(f"{prefix}sinks", spec.heads)], None)


def add_norms(layout: Layout, spec: DecoderSpec, layer: int, prefix: str) -> None:
    own, names = spec.layers[layer], spec.names_of(layer)
    places = ("before_attention", "after_attention") if own.mixes else ()
    for place in (*places, *(("before_mlp", "after_mlp") if own.feeds else ())):
        if name := getattr(names, place):
            layout.add(place, (layer,), [(f"{prefix}{name}.weight", spec.hidden_size)], None)


def add_mlp(layout: Layout, spec: DecoderSpec, slab: int, prefix: str) -> None:
    size = spec.intermediate_size
    rows = (size, size) if not spec.ungated else (size,)
    layout.add("gate_up", (slab,), parts(prefix, spec.names.gate_up, rows), spec.hidden_size)
    layout.add("down", (slab,), [(f"{prefix}{spec.names.down}.weight", spec.hidden_size)], size)
    if spec.mlp_bias:
        layout.add("gate_up_bias", (slab,), parts(prefix, spec.names.gate_up, rows, "bias"), None)
        layout.add("down_bias", (slab,), [(f"{prefix}{spec.names.down}.bias", spec.hidden_size)], None)


def add_moe(layout: Layout, spec: DecoderSpec, moe: MoeSpec, slab: int, layer: str) -> None:
    """Places for the router and the experts of one layer, number `slab` among those with experts."""
    hidden, size, prefix = spec.hidden_size, moe.intermediate_size, f"{layer}{moe.block}."
    rows = (size, size) if not moe.ungated else (size,)
    layout.add("router", (slab,), [(f"{prefix}{moe.router}.weight", moe.experts)], hidden)
    if moe.router_bias:
        layout.add("router_bias", (slab,), [(f"{prefix}{moe.router}.bias", moe.experts)], None)
    if moe.score_bias:
        layout.add("score_bias", (slab,), [(f"{prefix}{moe.score_bias}", moe.experts)], None)
        layout.dtypes["score_bias"] = torch.float32  # small differences decide
    for expert in range(moe.experts):
        inside = f"{prefix}experts.{expert}."
        layout.add("expert_gate_up", (slab, expert), parts(inside, moe.gate_up, rows), hidden)
        layout.add("expert_down", (slab, expert), [(f"{inside}{moe.down}.weight", hidden)], size)
        if moe.expert_bias:
            layout.add("expert_gate_up_bias", (slab, expert), parts(inside, moe.gate_up, rows, "bias"), None)
            layout.add("expert_down_bias", (slab, expert), [(f"{inside}{moe.down}.bias", hidden)], None)
    if shared := moe.shared_intermediate_size:
        inside = f"{layer}{moe.shared[1:]}." if moe.shared.startswith(".") else f"{prefix}{moe.shared}."
        rows = (shared, shared) if not moe.ungated else (shared,)
        layout.add("shared_gate_up", (slab,), parts(inside, moe.shared_gate_up, rows), hidden)
        layout.add("shared_down", (slab,), [(f"{inside}{moe.shared_down}.weight", hidden)], shared)
        if moe.shared_gate:
            layout.add("shared_gate", (slab,), [(f"{prefix}shared_expert_gate.weight", 1)], hidden)
