"""From a decoder's spec to the layout of its weights: which checkpoint tensors exist and where each one lives."""

import torch

from quartet.scheduler_service.model.heads import add_head
from quartet.scheduler_service.model.latent import add_latent
from quartet.scheduler_service.model.layer_inputs import add_layer_inputs, add_own_input
from quartet.scheduler_service.model.recurrent import add_recurrent
from quartet.scheduler_service.model.spec import DecoderSpec, MoeSpec
from quartet.scheduler_service.model.streams import add_own_streams, add_streams
from quartet.scheduler_service.weights.parameters import Layout, Rows


def decoder_layout(spec: DecoderSpec, ranks: int = 1) -> Layout:
    """Buffers by kind, fused where layers read them together: qkv, and gate with up.

    `ranks`: so many have a part each of embeddings and head, by token; `spec` has one rank's part of all else.
    """
    tokens = tokens_here(spec.vocab_size, ranks)
    own_lm_head = spec.generates and not spec.tied
    layout = Layout(ignored=spec.ignored | frozenset(() if own_lm_head else {spec.head}))
    if spec.generates:
        layout.ties[spec.head] = embeddings_name(spec)
    layout.add("embed", (), [(embeddings_name(spec), tokens)], spec.hidden_size)
    layout.add("norm", (), [(f"{spec.prefix}{spec.names.norm}.weight", spec.hidden_size)], None)
    add_head(layout, spec.score_head)
    if own_lm_head:
        layout.add("lm_head", (), [(spec.head, tokens)], spec.hidden_size)
    if spec.layer_inputs:
        add_layer_inputs(layout, spec, spec.layer_inputs, tokens_here(spec.layer_inputs.vocabulary, ranks))
    if spec.streams:
        add_streams(layout, spec, spec.streams)
    for index, layer in enumerate(spec.layers):
        prefix, slabs, names = f"{spec.prefix}layers.{index}.", spec.slabs(index), spec.names_of(index)
        if layer.recurrent:
            add_recurrent(layout, layer.recurrent, spec.hidden_size, slabs.recurrent, prefix)
        if layer.attends:
            add_attention(layout, spec, index, f"{prefix}{names.attention}.")
        add_norms(layout, spec, index, prefix)
        if layer.feeds and layer.moe:
            add_moe(layout, spec, layer.moe, slabs.block, prefix)
        elif layer.feeds:
            add_mlp(layout, spec, index, f"{prefix}{names.mlp}.")
        if spec.layer_inputs:
            add_own_input(layout, spec, spec.layer_inputs, index, prefix)
        if spec.streams:
            add_own_streams(layout, spec, spec.streams, index, prefix)
        if spec.layer_scales:
            layout.add("layer_scale", (index,), [(f"{prefix}layer_scalar", 1)], None)
    return layout


def tokens_here(vocabulary: int, ranks: int) -> int:
    """How many tokens a table has on one of some ranks: all where they cannot be divided."""
    return vocabulary if vocabulary % ranks else vocabulary // ranks


def embeddings_name(spec: DecoderSpec) -> str:
    return f"{spec.prefix}{spec.names.embeddings}.weight"


def parts(prefix: str, names: tuple[str, ...], rows: tuple[int, ...], kind: str = "weight") -> list[tuple[str, Rows]]:
    """(name, rows) of fused tensors; a family that fuses them in the checkpoint has one name for all rows."""
    sizes: tuple[Rows, ...] = rows if len(names) == len(rows) else (rows,)
    return [(f"{prefix}{name}.{kind}", size) for name, size in zip(names, sizes, strict=True)]


def add_attention(layout: Layout, spec: DecoderSpec, index: int, prefix: str) -> None:
    """Places for the projections, biases and norms of the attention of layer number `index`."""
    own, layer = spec.layers[index], spec.slabs(index).attention
    if spec.latent is not None:
        add_latent(layout, spec, spec.latent, layer, prefix)
        return
    kind, dim = own.attention_kind, spec.head_dim_of(index)
    query, key = spec.heads * dim, spec.kv_heads_of(index) * dim
    names: tuple[str, ...] = spec.names.qkv
    rows: tuple[int, ...] = (2 * query if spec.output_gate else query, key, key)
    if own.reads is not None or own.values_from_keys:
        count = 1 if own.reads is not None else 2
        names, rows = names[:count], rows[:count]
    layout.add(f"qkv{kind}", (layer,), parts(prefix, names, rows), spec.hidden_size)
    layout.add(f"output{kind}", (layer,), [(f"{prefix}{spec.names.output}.weight", spec.hidden_size)], query)
    if spec.qkv_bias:
        layout.add(f"qkv{kind}_bias", (layer,), parts(prefix, names, rows, "bias"), None)
    if spec.output_bias:
        layout.add(f"output{kind}_bias", (layer,), [(f"{prefix}{spec.names.output}.bias", spec.hidden_size)], None)
    if spec.query_key_norm:
        per_head = spec.query_key_norm_over == "head"
        sizes = (dim, dim) if per_head else (query, key)
        layout.add(f"query_norm{kind}", (layer,), [(f"{prefix}{spec.names.query_norm}.weight", sizes[0])], None)
        if own.reads is None:
            layout.add(f"key_norm{kind}", (layer,), [(f"{prefix}{spec.names.key_norm}.weight", sizes[1])], None)
    if spec.sinks:
        layout.add(f"sinks{kind}", (layer,), [(f"{prefix}sinks", spec.heads)], None)


def add_norms(layout: Layout, spec: DecoderSpec, layer: int, prefix: str) -> None:
    own, names = spec.layers[layer], spec.names_of(layer)
    places = ("before_attention", "after_attention") if own.mixes else ()
    for place in (*places, *(("before_mlp", "after_mlp") if own.feeds else ())):
        if name := getattr(names, place):
            layout.add(place, (layer,), [(f"{prefix}{name}.weight", spec.hidden_size)], None)


def add_mlp(layout: Layout, spec: DecoderSpec, index: int, prefix: str) -> None:
    """Places for the dense feed-forward block of layer number `index`."""
    kind, slab = spec.layers[index].block_kind, spec.slabs(index).block
    size = spec.layers[index].intermediate_size or spec.intermediate_size
    rows = (size, size) if not spec.ungated else (size,)
    layout.add(f"gate_up{kind}", (slab,), parts(prefix, spec.names.gate_up, rows), spec.hidden_size)
    layout.add(f"down{kind}", (slab,), [(f"{prefix}{spec.names.down}.weight", spec.hidden_size)], size)
    if spec.mlp_bias:
        layout.add(f"gate_up{kind}_bias", (slab,), parts(prefix, spec.names.gate_up, rows, "bias"), None)
        layout.add(f"down{kind}_bias", (slab,), [(f"{prefix}{spec.names.down}.bias", spec.hidden_size)], None)


def add_moe(layout: Layout, spec: DecoderSpec, moe: MoeSpec, slab: int, layer: str) -> None:
    """Places for the router and the experts of one layer, number `slab` among those with experts."""
    hidden, size, prefix = spec.hidden_size, moe.intermediate_size, f"{layer}{moe.block}." if moe.block else layer
    rows = (size, size) if not moe.ungated else (size,)
    layout.add("router", (slab,), [(f"{prefix}{moe.router}.weight", moe.experts)], hidden)
    if moe.router_bias:
        layout.add("router_bias", (slab,), [(f"{prefix}{moe.router}.bias", moe.experts)], None)
    if moe.score_bias:
        layout.add("score_bias", (slab,), [(f"{prefix}{moe.score_bias}", moe.experts)], None)
        layout.dtypes["score_bias"] = torch.float32  # small differences decide
    if moe.router_norm:
        layout.add("router_norm", (slab,), [(f"{prefix}{moe.router_norm}", hidden)], None)
    if moe.expert_scale:
        layout.add("expert_scale", (slab,), [(f"{prefix}{moe.expert_scale}", moe.experts)], None)
    for buffer, name in moe_norms(moe).items():
        layout.add(buffer, (slab,), [(f"{layer}{name}.weight", hidden)], None)
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


def moe_norms(moe: MoeSpec) -> dict[str, str]:
    """Buffers of the norms inside a mixture, and their names below the layer; those that it has."""
    found = {"after_experts": moe.after, "before_shared": moe.shared_before, "after_shared": moe.shared_after}
    return {buffer: name for buffer, name in found.items() if name}
