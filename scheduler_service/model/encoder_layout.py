"""From an encoder's spec to the layout of its weights."""

from quartet.scheduler_service.model.encoder_moe import add_experts
from quartet.scheduler_service.model.encoder_spec import DistanceBias, DistanceVectors, EncoderSpec
from quartet.scheduler_service.model.heads import add_head
from quartet.scheduler_service.model.layout import parts
from quartet.scheduler_service.model.task_adapters import add_tasks
from quartet.scheduler_service.weights.parameters import Layout


def encoder_layout(spec: EncoderSpec) -> Layout:
    """Buffers by kind; query, key and value of a layer are one matrix."""
    layout = Layout()
    names, hidden = spec.names, spec.hidden_size
    for buffer, name, rows in spec.tables:
        layout.add(buffer, (), [(f"{spec.prefix}{name}.{names.weight}", rows)], hidden)
    if spec.embedding_norm:
        add_norm(layout, spec, "embedding_norm", (), f"{spec.prefix}{names.embedding_norm}")
    add_relative(layout, spec)
    if spec.norm_first:
        add_norm(layout, spec, "final_norm", (), f"{spec.prefix}{names.final_norm}")
    for index, layer in enumerate(spec.layers):
        add_layer(layout, spec, index, spec.prefix + names.layer.format(index))
        if layer.attention_norm:
            name = spec.prefix + names.layer.format(index) + names.attention_norm
            add_norm(layout, spec, "attention_norm", (index,), name)
    add_head(layout, spec.head)
    if spec.word_head is not None:
        add_head(layout, (spec.word_head.transform,), "word_head")
        if spec.word_head.bias:
            layout.add("word_bias", (), [(spec.word_head.bias, spec.vocab_size)], None)
    if spec.tasks is not None:
        add_tasks(layout, spec, spec.tasks)
    layout.ignored = spec.ignored - layout.places.keys()
    return layout


def add_relative(layout: Layout, spec: EncoderSpec) -> None:
    """The table of distances."""
    match spec.relative:
        case DistanceBias() as bias:
            layout.add("relative", (), [(f"{spec.prefix}{bias.table}.weight", bias.classes)], spec.heads)
        case DistanceVectors() as vectors:
            layout.add("relative", (), [(f"{spec.prefix}{vectors.table}.weight", 2 * vectors.span)], spec.hidden_size)
            if vectors.norm:
                add_norm(layout, spec, "relative_norm", (), f"{spec.prefix}{vectors.norm}")


def add_norm(layout: Layout, spec: EncoderSpec, buffer: str, index: tuple[int, ...], name: str) -> None:
    weight, bias = spec.names.norm
    layout.add(buffer, index, [(f"{name}.{weight}", spec.hidden_size)], None)
    if spec.norm_bias:
        layout.add(f"{buffer}_bias", index, [(f"{name}.{bias}", spec.hidden_size)], None)


def add_layer(layout: Layout, spec: EncoderSpec, layer: int, prefix: str) -> None:
    """Places for one layer's tensors, whose names in the checkpoint begin with `prefix`."""
    names, experts = spec.names, spec.layers[layer].experts
    for buffer, tensors, rows, columns, bias in spec.products(names):
        in_block = buffer in ("up", "down")
        if in_block and experts:
            continue
        index = (spec.block_place(layer) if in_block else layer,)
        layout.add(buffer, index, parts(prefix, tensors, rows, names.weight), columns)
        if bias:
            layout.add(f"{buffer}_bias", index, parts(prefix, tensors, rows, "bias"), None)
    if experts:
        assert spec.moe is not None
        add_experts(layout, spec, spec.moe, spec.block_place(layer), prefix)
    add_norm(layout, spec, "mlp_norm", (layer,), f"{prefix}{names.mlp_norm}")
    if spec.head_by_head:
        add_head_by_head(layout, spec, (layer,), f"{prefix}attention.self.")


def add_head_by_head(layout: Layout, spec: EncoderSpec, place: tuple[int, ...], prefix: str) -> None:
    """What stands beside the one matrix: biases of queries and values, products for distances."""
    hidden = spec.hidden_size
    layout.add("query_bias", place, [(f"{prefix}q_bias", hidden)], None)
    layout.add("value_bias", place, [(f"{prefix}v_bias", hidden)], None)
    layout.add("distance_key", place, [(f"{prefix}pos_proj.weight", hidden)], hidden)
    layout.add("distance_query", place, [(f"{prefix}pos_q_proj.weight", hidden)], hidden)
    layout.add("distance_query_bias", place, [(f"{prefix}pos_q_proj.bias", hidden)], None)
