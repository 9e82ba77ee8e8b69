"""One rank's part of a decoder: its spec and the layout of its weights.

Queries, keys, values, gates and ups are cut by output (rows of the weight), `output` and `down` by input (columns),
whose products are summed over the ranks. Layers of other sizes than the model's are cut by their own. Experts are cut
like a dense block, each in its middle; one sum follows all of them. Embeddings and head are cut by token where the
vocabulary can be divided. Norms and routers are whole everywhere.
"""

from collections.abc import Callable
from dataclasses import replace

from quartet.kernels.cpu.native.quantized import UNIT
from quartet.runtime.errors import StartupError
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.layout import decoder_layout
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec
from quartet.scheduler_service.weights.cuts import Cut
from quartet.scheduler_service.weights.parameters import Layout, kind_of
from quartet.scheduler_service.weights.storage import PRODUCTS

UNEVEN = "--tp-size {}: {} {} cannot be divided among the ranks; use a --tp-size that divides them"
REFUSED = "--tp-size {}: {}, which one process computes; use --tp-size 1"
SPLIT = (
    "--quantization {} with --tp-size {}: each rank has {} columns of the weight {}, which are not whole groups of {}; "
    "use another --tp-size, or leave one out"
)
# What several ranks do not compute: whether a model has it, and what it is called
WHOLE: list[tuple[Callable[[DecoderSpec], bool], str]] = [
    (lambda spec: spec.latent is not None, "this model has latent attention"),
    (lambda spec: spec.is_recurrent, "this model has recurrent layers"),
    (lambda spec: spec.output_gate, "this model has gates behind attention"),
    (lambda spec: spec.query_key_norm_over != "head", "this model norms queries and keys over all heads together"),
    (
        lambda spec: any(layer.moe and layer.moe.expert_bias for layer in spec.layers),
        "this model's experts have biases",
    ),
    (lambda spec: spec.streams is not None, "this model has several residual streams"),
    (lambda spec: spec.layer_inputs is not None, "this model has embeddings for each layer"),
    (lambda spec: is_fused(spec), "this family stores fused projections (such as qkv_proj)"),
]


def is_fused(spec: DecoderSpec) -> bool:
    """Whether a checkpoint has one tensor for what is cut into several."""
    parts = [(spec.names.qkv, 3), (spec.names.gate_up, 1 if spec.ungated else 2)]
    for mixture in filter(None, (layer.moe for layer in spec.layers)):
        parts += [(names, 1 if mixture.ungated else 2) for names in (mixture.gate_up, mixture.shared_gate_up)]
    return any(len(names) != count for names, count in parts)


def refuse_whole(spec: DecoderSpec, ranks: int) -> None:
    """Raise StartupError for a model of which ranks cannot have parts."""
    for has_it, what in WHOLE:
        if has_it(spec):
            raise StartupError(REFUSED.format(ranks, what))


def shard_spec(spec: DecoderSpec, ranks: int) -> DecoderSpec:
    """The decoder that one rank computes. Raises StartupError where there is none."""
    refuse_whole(spec, ranks)
    kv_heads = share_of_keys(spec.kv_heads, ranks)
    return replace(
        spec,
        heads=share(spec.heads, ranks, "attention heads"),
        kv_heads=kv_heads,
        intermediate_size=share(spec.intermediate_size, ranks, "columns of the feed-forward block"),
        layers=tuple(shard_layer(layer, ranks) for layer in spec.layers),
    )


def shard_layer(layer: LayerSpec, ranks: int) -> LayerSpec:
    """The same of one layer, whose sizes may be its own."""
    if layer.kv_heads is not None:
        layer = replace(layer, kv_heads=share_of_keys(layer.kv_heads, ranks))
    if layer.intermediate_size is not None:
        size = share(layer.intermediate_size, ranks, "columns of the feed-forward block")
        layer = replace(layer, intermediate_size=size)
    if layer.moe is None:
        return layer
    size = share(layer.moe.intermediate_size, ranks, "columns of an expert")
    shared = share(layer.moe.shared_intermediate_size, ranks, "columns of the shared expert")
    return replace(layer, moe=replace(layer.moe, intermediate_size=size, shared_intermediate_size=shared))


def share_of_keys(heads: int, ranks: int) -> int:
    """How many heads of keys and values a rank has; neighbours share one where there are fewer than ranks."""
    if heads % ranks and ranks % heads:
        raise StartupError(UNEVEN.format(ranks, heads, "heads of keys and values"))
    return max(1, heads // ranks)


def share(count: int, ranks: int, what: str) -> int:
    if count % ranks:
        raise StartupError(UNEVEN.format(ranks, count, what))
    return count // ranks


def shard_layout(spec: DecoderSpec, parallel: Parallel) -> Layout:
    """The layout of one rank's weights, `spec` being the whole model's."""
    whole = decoder_layout(spec)
    if parallel.size == 1:
        return whole
    rows = spec.vocab_size if spec.vocab_size % parallel.size else spec.vocab_size // parallel.size
    layout = decoder_layout(shard_spec(spec, parallel.size), rows)
    layout.parallel = parallel
    for name, place in layout.places.items():
        if (cut := cut_of(whole.places[name].shape, place.shape, parallel)) is not None:
            layout.cuts[name] = cut
            layout.cut_buffers[place.buffer] = cut.dimension
    return layout


def check_groups(layout: Layout, choice: str) -> None:
    """Raise StartupError where a cut would fall into a group of numbers that share a scale (--quantization)."""
    for buffer, dimension in layout.cut_buffers.items():
        columns = layout.buffers[buffer][-1]
        if kind_of(buffer) in PRODUCTS and dimension == 1 and columns % UNIT:
            raise StartupError(SPLIT.format(choice, layout.parallel.size, columns, buffer, UNIT))


def cut_of(whole: tuple[int, ...], own: tuple[int, ...], parallel: Parallel) -> Cut | None:
    """The part of a tensor that a rank has; None: all of it. Some ranks may share one, as heads of keys."""
    for dimension, (all_of_it, length) in enumerate(zip(whole, own, strict=True)):
        if all_of_it != length:
            parts = all_of_it // length
            return Cut(whole, dimension, parallel.rank * parts // parallel.size * length, length)
    return None
