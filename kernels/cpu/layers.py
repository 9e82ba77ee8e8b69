"""All layers of a decoder in one call of the compiled kernels: attention, and a feed-forward block or experts, each.

Called one by one from Python, the kernels of a layer take 0.2 ms more than they compute; a step has some 24 layers.
Layers may differ in all but the width of the residual stream. The bits are those of single calls, but where there are
several residual streams.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from quartet.kernels.cpu import addresses, arguments
from quartet.kernels.cpu.experts import Experts, ExpertsArgument
from quartet.kernels.cpu.layer_parts import OwnInput, OwnStreams
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native import structures
from quartet.kernels.cpu.native.library import ACTIVATIONS, Library, NormWeight
from quartet.kernels.cpu.native.page_table import PageTable, Wanted
from quartet.kernels.cpu.native.structures import Attention, Rotation, Step

Pools = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, each (kv_heads, pool tokens, dim)


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated feed-forward block with the norms before and behind it."""

    gate_up: Linear
    down: Linear
    before: NormWeight | None
    after: NormWeight | None
    activation: str  # of native.ACTIVATIONS
    cutoff: float | None = None  # of sparse gates, in standard deviations

    @property
    def linears(self) -> list[Linear]:
        """Its products."""
        return [self.gate_up, self.down]

    @property
    def norms(self) -> list[NormWeight | None]:
        return [self.before, self.after]

    def can_run(self) -> bool:
        """Whether the kernels know every operation."""
        return (
            all(linear.has_kernel for linear in self.linears)
            and native.can_gate(len(self.gate_up.weight))
            and self.activation in ACTIVATIONS
        )

    def check(self) -> None:
        """Raise AssertionError unless all parts belong together. C code trusts them."""
        hidden, size = self.down.weight.shape
        arguments.check_linear(self.gate_up, 2 * size, hidden)
        arguments.check_linear(self.down, hidden, size)
        for norm in self.norms:
            arguments.check_norm(norm, hidden)


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer computes with."""

    qkv: Linear
    output: Linear
    feed_forward: Mlp | Experts
    before_attention: NormWeight | None
    after_attention: NormWeight | None
    query_norm: NormWeight | None
    key_norm: NormWeight | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    causal: bool
    rope: int  # which of a step's rotations
    value_norm: NormWeight | None = None
    values_from_keys: bool = False  # `qkv` has no columns of values
    reads: bool = False  # `qkv` has queries alone, and the pools are those of an earlier layer
    own_input: OwnInput | None = None
    streams: OwnStreams | None = None  # then it has an input of its own too, and no scale
    output_scale: torch.Tensor | None = None  # (1,) of all that the layer leaves

    def can_run(self, kernels: Library, rotary_dim: int) -> bool:
        """Whether the kernels know every operation of this layer."""
        return (
            all(linear.has_kernel for linear in self.linears)
            and self.feed_forward.can_run()
            and (self.own_input is None or self.own_input.activation in ACTIVATIONS)
            and len({norm[1:] for norm in self.head_norms if norm is not None}) <= 1
            and (self.output_scale is None or self.last_norm is not None or isinstance(self.feed_forward, Experts))
            and (self.streams is None or (self.streams.can_run() and self.output_scale is None))
            and (self.streams is None or (self.own_input is not None and isinstance(self.feed_forward, Mlp)))
            and kernels.can_rotate(self.head_dim, rotary_dim)
            and kernels.can_attend(self.head_dim)
            and (self.causal or self.window is None)
        )

    @property
    def linears(self) -> list[Linear]:
        """Its products."""
        own = [] if self.own_input is None else [self.own_input.gate, self.own_input.projection]
        streams = [] if self.streams is None else self.streams.linears
        return [self.qkv, self.output, *self.feed_forward.linears, *own, *streams]

    @property
    def head_norms(self) -> list[NormWeight | None]:
        return [self.query_norm, self.key_norm, self.value_norm]

    @property
    def last_norm(self) -> NormWeight | None:
        """That of what is added last, if the kernels of whole rows add it: they scale the sum."""
        if self.own_input is not None:
            return self.own_input.norm
        return self.feed_forward.after if isinstance(self.feed_forward, Mlp) else None

    @property
    def own_kv_heads(self) -> int:
        """Heads of keys that `qkv` gives."""
        return 0 if self.reads else self.kv_heads

    @property
    def widest_inner(self) -> int:
        """Numbers of a row between two products behind attention; experts have memory of their own."""
        block = self.feed_forward.down.weight.shape[1] if isinstance(self.feed_forward, Mlp) else 0
        own = 0 if self.own_input is None else len(self.own_input.gate.weight)
        return max(block, own, 0 if self.streams is None else len(self.streams.left.weight))

    @property
    def widest_gates(self) -> int:
        """Numbers of a row in front of sparse gates."""
        block = self.feed_forward
        return len(block.gate_up.weight) if isinstance(block, Mlp) and block.cutoff is not None else 0

    def check(self) -> None:
        """Raise AssertionError unless the weights belong together. C code trusts them."""
        hidden, dim = len(self.output.weight), self.head_dim
        assert self.heads % self.kv_heads == 0, (self.heads, self.kv_heads)
        parts = self.heads + (1 if self.values_from_keys else 2) * self.own_kv_heads
        arguments.check_linear(self.qkv, parts * dim, hidden)
        arguments.check_linear(self.output, hidden, self.heads * dim)
        self.feed_forward.check()
        if self.own_input is not None:
            self.own_input.check(hidden)
        if self.streams is not None:
            self.streams.check(hidden)
        scale = self.output_scale
        assert scale is None or (scale.shape == (1,) and scale.dtype is torch.bfloat16), scale
        for norm, width in (
            (self.before_attention, hidden),
            (self.after_attention, hidden),
            *((norm, dim) for norm in self.head_norms),
        ):
            arguments.check_norm(norm, width)


class Layers:
    """The layers of a decoder, which `kernels` can all run."""

    def __init__(self, kernels: Library, layers: Sequence[Layer], rotary_dims: Sequence[int]) -> None:
        """`rotary_dims`: by rope."""
        for layer in layers:
            assert layer.can_run(kernels, rotary_dims[layer.rope]), layer
            layer.check()
        assert len({layer.qkv.weight.shape[1] for layer in layers}) == 1, "layers of one width"
        self.kernels = kernels
        self.layers = layers
        self.rotary_dims = rotary_dims
        self.hidden = len(layers[0].output.weight)
        self.structures = (structures.Layer * len(layers))()
        self.experts = [
            ExpertsArgument(layer.feed_forward) if isinstance(layer.feed_forward, Experts) else None for layer in layers
        ]
        counts = {0 if layer.streams is None else layer.streams.count for layer in layers}
        assert len(counts) == 1, f"as many streams everywhere, not {counts}"
        self.streams = counts.pop()  # 0: there is one
        sizes = {0 if layer.own_input is None else len(layer.own_input.gate.weight) for layer in layers}
        assert len(sizes) == 1, f"inputs of one size, not {sizes}"
        self.input_size = sizes.pop()  # 0: layers have no inputs of their own
        heads = max(layer.heads * layer.head_dim for layer in layers)
        self.widths = [  # of the memory between the kernels, in the order of `Step`
            max(len(layer.qkv.weight) for layer in layers),
            heads,
            heads,
            max(layer.widest_inner for layer in layers),
            self.hidden,
            max(layer.widest_gates for layer in layers),
            self.streams * self.hidden,
            self.hidden if self.streams else 0,
        ]
        self.can_leave_out = not (self.streams or self.input_size)  # rows that nobody looks at, in the last layer
        self.filled = (-1, -1)  # addresses.moves() then, and which pools
        self.pool_tokens = 0
        run = kernels.functions.quartet_layers
        run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(Step))

    def run(
        self,
        residual: torch.Tensor,
        rotations: Sequence[tuple[torch.Tensor, torch.Tensor]],
        slots: torch.Tensor,
        table: PageTable,
        pools: Callable[[], Sequence[Pools]],
        which_pools: int,
        inputs: torch.Tensor | None = None,
        stack: torch.Tensor | None = None,
        wanted: Wanted | None = None,
        final: NormWeight | None = None,
    ) -> torch.Tensor:
        """The residual stream (rows, hidden) through all layers, in place; or the `stack` (rows, streams, hidden).

        Returns it; of rows that are `wanted` it may be these alone, and the rest of the memory is anything. `final`: a
        norm of what is returned, where there is one stream. By rope: rotations as Library.rotate takes them. By layer:
        pools, to whose places `slots` (rows,) int64 keys and values go, and which `table` describes (asked for only if
        something has moved, or `which_pools`, a number of addresses.moved(), is another one than before); and inputs of
        their own (layers, rows, size), if they have such.
        """
        native.check_matrix(residual)
        rows = len(residual)
        assert residual.is_contiguous() and residual.shape[1] == self.hidden, residual.shape
        assert slots.shape == (rows,) and slots.dtype is torch.int64, (slots.shape, slots.dtype)
        assert len(table.starts) == len(table.lengths) + 1, (table.starts.shape, table.lengths.shape)
        for (cos, sin), rotary_dim in zip(rotations, self.rotary_dims, strict=True):
            assert cos.shape == sin.shape == (rows, 1, rotary_dim), (cos.shape, sin.shape, rows, rotary_dim)
            assert cos.dtype is sin.dtype is torch.bfloat16 and cos.is_contiguous() and sin.is_contiguous()
        if self.input_size:
            assert inputs is not None and inputs.shape == (len(self.layers), rows, self.input_size), inputs
            assert inputs.dtype is torch.bfloat16 and inputs.is_contiguous(), (inputs.dtype, inputs.stride())
        if self.streams:
            assert stack is not None and stack.shape == (rows, self.streams, self.hidden), stack
            assert stack.dtype is torch.bfloat16 and stack.is_contiguous(), (stack.dtype, stack.stride())
        self.fill(pools, which_pools)
        assert table.most_tokens <= self.pool_tokens < 2**31, (table.most_tokens, self.pool_tokens)
        if not self.can_leave_out or self.layers[0].qkv.additions is not None:
            wanted = None
        if wanted is not None:
            assert len(wanted.starts) == len(table.starts), (wanted.starts.shape, table.starts.shape)
            assert wanted.rows.dtype is wanted.starts.dtype is torch.int64, (wanted.rows.dtype, wanted.starts.dtype)
        arguments.check_norm(final, self.hidden)
        self.call(residual, rotations, slots, table, inputs, stack, wanted, final)
        return residual if wanted is None else residual[: len(wanted.rows)]

    def fill(self, pools: Callable[[], Sequence[Pools]], which_pools: int) -> None:
        """Have `structures` describe the layers where they are now: updates of weights, for one, move them."""
        wanted = addresses.moves(), which_pools
        if wanted == self.filled:
            return
        own = pools()
        parts = zip(self.structures, self.layers, self.experts, own, strict=True)
        for structure, layer, experts, own_pools in parts:
            fill(structure, layer, self.rotary_dims[layer.rope], own_pools)
            if experts is not None:
                structure.experts = ctypes.pointer(experts.fill())
        for place, layer in enumerate(self.layers):
            self.link(place, layer)
        self.filled = wanted
        self.pool_tokens = min(keys.shape[1] for keys, _ in own)

    def link(self, place: int, layer: Layer) -> None:
        """Say which product follows which: the beginning of its weight is prefetched while threads wait."""
        parts = [(place, "qkv"), (place, "output")]
        if isinstance(layer.feed_forward, Mlp) and layer.streams is None:
            parts += [(place, "gate_up"), (place, "down")]
            if layer.own_input is None and place + 1 < len(self.layers):
                parts.append((place + 1, "qkv"))
        for (at, name), (following, its_name) in pairwise(parts):
            product = getattr(structures.Layer, its_name)
            address = ctypes.addressof(self.structures) + following * ctypes.sizeof(structures.Layer) + product.offset
            getattr(self.structures[at], name).next = address

    def call(
        self,
        residual: torch.Tensor,
        rotations: Sequence[tuple[torch.Tensor, torch.Tensor]],
        slots: torch.Tensor,
        table: PageTable,
        inputs: torch.Tensor | None,
        stack: torch.Tensor | None,
        wanted: Wanted | None,
        final: NormWeight | None,
    ) -> None:
        """Run the layers as `structures` describes them."""
        rows, pointers = len(residual), ctypes.c_void_p * len(rotations)
        size = native.padded(rows, native.ROWS_OF_TILES)  # so all parts begin at cache lines
        memory = residual.new_empty(size * sum(self.widths))
        ends = accumulate(self.widths, initial=0)
        *scratch, wide, predicted, beside, _ = (memory.data_ptr() + size * end * memory.itemsize for end in ends)
        said = residual.new_empty(rows, self.streams, dtype=torch.float32)
        step = Step(
            rows,
            residual.data_ptr(),
            *scratch,
            None if inputs is None else inputs.data_ptr(),
            wide,
            None if stack is None else stack.data_ptr(),
            predicted,
            beside,
            said.data_ptr(),
            pointers(*(cos.data_ptr() for cos, _ in rotations)),
            pointers(*(sin.data_ptr() for _, sin in rotations)),
            slots.data_ptr(),
            *table.arguments(),
            torch.get_num_threads(),
            native.pointer_to(self.layers[0].qkv.additions, rows),
            0 if wanted is None else len(wanted.rows),
            None if wanted is None else wanted.rows.data_ptr(),
            None if wanted is None else wanted.starts.data_ptr(),
            arguments.norm_argument(final),
        )
        functions = self.kernels.functions
        if functions.quartet_layers(self.kernels.kernels, self.structures, len(self.layers), step):
            raise MemoryError(f"no memory for the layers of {rows} tokens")


def fill(structure: structures.Layer, layer: Layer, rotary_dim: int, pools: Pools) -> None:
    """Describe a layer with the addresses that its weights have now."""
    structure.qkv = arguments.product(layer.qkv, "bf16", layer.before_attention)
    structure.output = arguments.product(layer.output, "bf16" if layer.after_attention else "add")
    structure.after_attention = arguments.norm_argument(layer.after_attention)
    if isinstance(block := layer.feed_forward, Mlp):
        output = "gated" if block.cutoff is None else "bf16"
        structure.gate_up = arguments.product(block.gate_up, output, block.before, block.activation)
        structure.sparse, structure.cutoff = block.cutoff is not None, block.cutoff or 0.0
        structure.down = arguments.product(block.down, "bf16" if block.after else "add")
        structure.after_mlp = arguments.norm_argument(block.after)
    if layer.own_input is not None:
        layer.own_input.fill(structure)
    if layer.streams is not None:
        layer.streams.fill(structure)
    structure.scale = None if layer.output_scale is None else layer.output_scale.data_ptr()
    fill_attention(structure, layer, rotary_dim, pools)


def fill_attention(structure: structures.Layer, layer: Layer, rotary_dim: int, pools: Pools) -> None:
    """Describe what is between the products of a layer's attention."""
    keys, values = pools
    kv_heads, dim = layer.kv_heads, layer.head_dim
    assert keys.shape == values.shape and keys.shape[::2] == (kv_heads, dim), (keys.shape, values.shape)
    assert keys.dtype is values.dtype is torch.bfloat16 and keys.is_contiguous() and values.is_contiguous()
    _, epsilon, offset = next(filter(None, layer.head_norms), (None, 0.0, 0.0))
    key_pointer, value_pointer, head_stride = keys.data_ptr(), values.data_ptr(), keys.stride(0)
    structure.rotation = Rotation(
        qkv_stride=len(layer.qkv.weight),
        heads=layer.heads,
        kv_heads=layer.own_kv_heads,
        dim=dim,
        rotary_dim=rotary_dim,
        query_norm=arguments.pointer(layer.query_norm),
        key_norm=arguments.pointer(layer.key_norm),
        value_norm=arguments.pointer(layer.value_norm),
        values_from_keys=layer.values_from_keys,
        epsilon=epsilon,
        norm_offset=offset,
        keys=key_pointer,
        values=value_pointer,
        head_stride=head_stride,
    )
    structure.attention = Attention(
        q_stride=layer.heads * dim,
        out_stride=layer.heads * dim,
        keys=key_pointer,
        values=value_pointer,
        head_stride=head_stride,
        kv_heads=kv_heads,
        group=layer.heads // kv_heads,
        dim=dim,
        scale=layer.scale,
        softcap=layer.softcap or 0.0,
        window=layer.window or 0,
        causal=layer.causal,
    )
    structure.rope = layer.rope
