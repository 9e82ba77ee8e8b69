"""One rank's part of a decoder: its spec and the layout of its weights.

Queries, keys, values, gates and ups are cut by output (rows of the weight), `output` and `down` by input (columns),
whose products are summed over the ranks. A recurrence is cut in the same way, by heads or channels, with its states and
its convolution. A tensor in which several matrices lie is cut in each of them (`Place.sections`). Layers of other sizes
than the model's are cut by their own. Experts are cut like a dense block, each in its middle; one sum follows all of
them. Embeddings, those for each layer too, and head are cut by token where the vocabulary can be divided. Routers,
norms of the residual stream, what all heads of latent attention share, and the small products between several residual
streams and of a layer's own input are whole everywhere.
"""

from collections.abc import Iterable
from dataclasses import replace

from quartet.kernels.cpu.native.quantized import UNIT
from quartet.runtime.errors import StartupError
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.gated_delta import GatedDeltaSpec
from quartet.scheduler_service.model.layout import decoder_layout
from quartet.scheduler_service.model.recurrent import RecurrentSpec, ShortConvSpec
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec
from quartet.scheduler_service.model.state_space import StateSpaceSpec
from quartet.scheduler_service.weights.checkpoint import Checkpoint
from quartet.scheduler_service.weights.cuts import Cut
from quartet.scheduler_service.weights.own_parts import cut_groups, own_parts
from quartet.scheduler_service.weights.parameters import Layout, Place, kind_of
from quartet.scheduler_service.weights.storage import PRODUCTS, stored_scheme

UNEVEN = "--tp-size {}: {} {} cannot be divided among the ranks; use a --tp-size that divides them"
REFUSED = "--tp-size {}: {}, which one process computes; use --tp-size 1"
KEPT = (
    "--tp-size {}: each rank has {} columns of {}, whose numbers share scales in groups of {}; as they are stored only "
    "whole groups of 16 can be kept; use another --tp-size, or --quantization none, which expands the weights"
)
SPLIT = (
    "--quantization {} with --tp-size {}: each rank has {} columns of the weight {}, which are not whole groups of {}; "
    "use another --tp-size, or leave one out"
)


def shard_spec(spec: DecoderSpec, ranks: int) -> DecoderSpec:
    """The decoder that one rank computes. Raises StartupError where there is none."""
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
    if layer.recurrent is not None:
        layer = replace(layer, recurrent=shard_recurrent(layer.recurrent, ranks))
    if layer.intermediate_size is not None:
        size = share(layer.intermediate_size, ranks, "columns of the feed-forward block")
        layer = replace(layer, intermediate_size=size)
    if layer.moe is None:
        return layer
    size = share(layer.moe.intermediate_size, ranks, "columns of an expert")
    shared = share(layer.moe.shared_intermediate_size, ranks, "columns of the shared expert")
    return replace(layer, moe=replace(layer.moe, intermediate_size=size, shared_intermediate_size=shared))


def shard_recurrent(spec: RecurrentSpec, ranks: int) -> RecurrentSpec:
    """The same of a recurrence: heads, or channels, with their part of the convolution, of gates and of the state."""
    match spec:
        case ShortConvSpec():
            return replace(spec, channels=share(spec.channels, ranks, "channels of the convolution"))
        case StateSpaceSpec():
            own = replace(
                spec,
                heads=share(spec.heads, ranks, "heads of the state space"),
                groups=share_of_keys(spec.groups, ranks, "groups of the state space"),
            )
            return replace(own, norm_ranks=max(1, ranks // spec.groups))
        case GatedDeltaSpec():
            keys = "heads of keys of linear attention"
            many = share if spec.by_key_head else share_of_keys  # rows that are ordered by them are not repeated
            values = share(spec.value_heads, ranks, "heads of values of linear attention")
            return replace(spec, value_heads=values, key_heads=many(spec.key_heads, ranks, keys))


def share_of_keys(heads: int, ranks: int, what: str = "heads of keys and values") -> int:
    """How many heads of keys and values a rank has; neighbours share one where there are fewer than ranks."""
    if heads % ranks and ranks % heads:
        raise StartupError(UNEVEN.format(ranks, heads, what))
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
    layout = decoder_layout(shard_spec(spec, parallel.size), parallel.size)
    layout.parallel = parallel
    for name, place in layout.places.items():
        if (cut := cut_of(whole.places[name], place, parallel)) is not None:
            layout.cuts[name] = cut
            layout.cut_buffers[place.buffer] = cut.dimension
    return layout


def check_groups(layout: Layout, choice: str) -> None:
    """Raise StartupError where a cut would fall into a group of numbers that share a scale (--quantization)."""
    for buffer, dimension in layout.cut_buffers.items():
        columns = layout.buffers[buffer][-1]
        if kind_of(buffer) in PRODUCTS and dimension == 1 and columns % UNIT:
            raise StartupError(SPLIT.format(choice, layout.parallel.size, columns, buffer, UNIT))


def check_stored(layout: Layout, checkpoint: Checkpoint, kept: bool) -> None:
    """Raise StartupError where a rank's part of a checkpoint cannot be read.

    `kept`: the numbers of quantized weights stay as they are stored, so a cut must not fall into a group of them.
    """
    own = own_parts(checkpoint, layout.cuts)
    for name in cut_groups(checkpoint, own) if kept else ():
        if kind_of(layout.places[name].buffer) in PRODUCTS:
            scheme = stored_scheme(checkpoint, name)
            assert scheme is not None, name
            columns, size = own.quantized[name].shape[1], scheme.group_size
            raise StartupError(KEPT.format(layout.parallel.size, columns, name, size))


def cut_of(whole: Place, own: Place, parallel: Parallel) -> Cut | None:
    """The part of a tensor that a rank has; None: all of it. Some ranks may share one, as heads of keys."""
    for dimension, (all_of_it, length) in enumerate(zip(whole.shape, own.shape, strict=True)):
        if all_of_it != length:
            by_section = dimension == 0 and whole.sections
            sections = zip(whole.sections, own.sections, strict=True) if by_section else ((all_of_it, length),)
            return Cut(whole.shape, dimension, spans_of(sections, parallel))
    return None


def spans_of(sections: Iterable[tuple[int, int]], parallel: Parallel) -> tuple[tuple[int, int], ...]:
    """First place and length of a rank's part of each section, given as all that it has and what a rank has of it."""
    spans: list[tuple[int, int]] = []
    at = 0
    for all_of_it, length in sections:
        parts = all_of_it // length
        spans.append((at + parallel.rank * parts // parallel.size * length, length))
        at += all_of_it
    return tuple(spans)
