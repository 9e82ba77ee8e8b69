"""All layers of a decoder in one call of the compiled kernels: attention and a gated feed-forward block each.

Called one by one from Python, the kernels of a layer take 0.2 ms more than they compute; a step has some 24 layers.
The bits are those of single calls.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native import structures
from quartet.kernels.cpu.native.library import ACTIVATIONS, NOT_QUANTIZED, OUTPUTS, Library, NormWeight, PageTable
from quartet.kernels.cpu.native.structures import Attention, Product, Rotation, Step

Pools = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, each (kv_heads, pool tokens, dim)


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer computes with."""

    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear
    before_attention: NormWeight | None
    before_mlp: NormWeight | None
    query_norm: NormWeight | None
    key_norm: NormWeight | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    causal: bool
    activation: str  # of native.ACTIVATIONS
    rope: int  # which of a step's rotations

    def can_run(self, kernels: Library, rotary_dim: int) -> bool:
        """Whether the kernels know every operation of this layer."""
        return (
            all(linear.has_kernel for linear in self.linears)
            and kernels.can_rotate(self.head_dim, rotary_dim)
            and kernels.can_attend(self.head_dim)
            and native.can_gate(len(self.gate_up.weight))
            and self.activation in ACTIVATIONS
            and (self.causal or self.window is None)
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its products."""
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def norms(self) -> list[torch.Tensor]:
        """The weights of its norms."""
        norms = self.before_attention, self.before_mlp, self.query_norm, self.key_norm
        return [norm[0] for norm in norms if norm is not None]


class Layers:
    """The layers of a decoder, which `kernels` can all run."""

    def __init__(self, kernels: Library, layers: Sequence[Layer], rotary_dims: Sequence[int]) -> None:
        """`rotary_dims`: by rope."""
        for layer in layers:
            assert layer.can_run(kernels, rotary_dims[layer.rope]), layer
            check_shapes(layer)
        assert len({len(layer.output.weight) for layer in layers}) == 1, "layers of one width"
        self.kernels = kernels
        self.layers = layers
        self.rotary_dims = rotary_dims
        self.hidden = len(layers[0].output.weight)
        self.structures = (structures.Layer * len(layers))()
        self.linears = [linear for layer in layers for linear in layer.linears]
        self.norms = [norm for layer in layers for norm in layer.norms]
        self.addresses: list[int] = []  # that are in `structures`
        self.pool_tokens = 0
        run = kernels.functions.quartet_layers
        run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(Step))

    def run(
        self,
        residual: torch.Tensor,
        rotations: Sequence[tuple[torch.Tensor, torch.Tensor]],
        slots: torch.Tensor,
        table: PageTable,
        pools: Sequence[Pools],
    ) -> None:
        """The residual stream (rows, hidden) through all layers, in place.

        By rope: rotations as Library.rotate takes them. By layer: pools, to whose places `slots` (rows,) int64 keys and
        values go, and which `table` describes.
        """
        native.check_matrix(residual)
        rows = len(residual)
        assert residual.is_contiguous() and residual.shape[1] == self.hidden, residual.shape
        assert slots.shape == (rows,) and slots.dtype is torch.int64, (slots.shape, slots.dtype)
        assert len(table.starts) == len(table.lengths) + 1, (table.starts.shape, table.lengths.shape)
        for (cos, sin), rotary_dim in zip(rotations, self.rotary_dims, strict=True):
            assert cos.shape == sin.shape == (rows, 1, rotary_dim), (cos.shape, sin.shape, rows, rotary_dim)
            assert cos.dtype is sin.dtype is torch.bfloat16 and cos.is_contiguous() and sin.is_contiguous()
        self.fill(pools)
        assert table.most_tokens <= self.pool_tokens < 2**31, (table.most_tokens, self.pool_tokens)
        self.call(residual, rotations, slots, table)

    def fill(self, pools: Sequence[Pools]) -> None:
        """Have `structures` describe the layers where they are now: updates of weights, for one, move them."""
        addresses = [address for linear in self.linears for address in linear.addresses()]
        addresses += [norm.data_ptr() for norm in self.norms]
        addresses += [pool.data_ptr() for both in pools for pool in both]
        if addresses == self.addresses:
            return
        for structure, layer, own_pools in zip(self.structures, self.layers, pools, strict=True):
            fill(structure, layer, self.rotary_dims[layer.rope], own_pools)
        self.addresses = addresses
        self.pool_tokens = min(keys.shape[1] for keys, _ in pools)

    def call(
        self,
        residual: torch.Tensor,
        rotations: Sequence[tuple[torch.Tensor, torch.Tensor]],
        slots: torch.Tensor,
        table: PageTable,
    ) -> None:
        """Run the layers as `structures` describes them."""
        rows, pointers = len(residual), ctypes.c_void_p * len(rotations)
        heads = max(layer.heads * layer.head_dim for layer in self.layers)
        widest_qkv = max(len(layer.qkv.weight) for layer in self.layers)
        widest_inner = max(layer.down.weight.shape[1] for layer in self.layers)
        qkv, q, mixed, inner = (residual.new_empty(rows, width) for width in (widest_qkv, heads, heads, widest_inner))
        step = Step(
            rows,
            residual.data_ptr(),
            qkv.data_ptr(),
            q.data_ptr(),
            mixed.data_ptr(),
            inner.data_ptr(),
            pointers(*(cos.data_ptr() for cos, _ in rotations)),
            pointers(*(sin.data_ptr() for _, sin in rotations)),
            slots.data_ptr(),
            table.page_size,
            len(table.lengths),
            table.starts.data_ptr(),
            table.lengths.data_ptr(),
            table.pages.data_ptr(),
            table.page_starts.data_ptr(),
            torch.get_num_threads(),
        )
        functions = self.kernels.functions
        if functions.quartet_layers(self.kernels.kernels, self.structures, len(self.layers), step):
            raise MemoryError(f"no memory for the layers of {rows} tokens")


def check_shapes(layer: Layer) -> None:
    """Raise AssertionError unless the weights of a layer belong together. C code trusts them."""
    hidden, size = len(layer.output.weight), layer.down.weight.shape[1]
    heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.head_dim
    assert heads % kv_heads == 0, (heads, kv_heads)
    assert layer.qkv.weight.shape == ((heads + 2 * kv_heads) * dim, hidden), layer.qkv.weight.shape
    assert layer.output.weight.shape == (hidden, heads * dim), layer.output.weight.shape
    assert layer.gate_up.weight.shape == (2 * size, hidden), layer.gate_up.weight.shape
    assert layer.down.weight.shape == (hidden, size), layer.down.weight.shape
    for linear in layer.linears:
        bias = linear.bias
        assert bias is None or (bias.shape == linear.weight.shape[:1] and bias.dtype is torch.bfloat16), bias
    for norm, width in (
        (layer.before_attention, hidden),
        (layer.before_mlp, hidden),
        (layer.query_norm, dim),
        (layer.key_norm, dim),
    ):
        assert norm is None or (norm[0].shape == (width,) and norm[0].dtype is torch.bfloat16), norm


def fill(structure: structures.Layer, layer: Layer, rotary_dim: int, pools: Pools) -> None:
    """Describe a layer with the addresses that its weights have now."""
    keys, values = pools
    kv_heads, dim = layer.kv_heads, layer.head_dim
    assert keys.shape == values.shape and keys.shape[::2] == (kv_heads, dim), (keys.shape, values.shape)
    assert keys.dtype is values.dtype is torch.bfloat16 and keys.is_contiguous() and values.is_contiguous()
    structure.qkv = product(layer.qkv, "bf16", layer.before_attention)
    structure.output = product(layer.output, "add")
    structure.gate_up = product(layer.gate_up, "gated", layer.before_mlp, layer.activation)
    structure.down = product(layer.down, "add")
    _, epsilon, offset = layer.query_norm or layer.key_norm or (None, 0.0, 0.0)
    key_pointer, value_pointer, head_stride = keys.data_ptr(), values.data_ptr(), keys.stride(0)
    structure.rotation = Rotation(
        qkv_stride=len(layer.qkv.weight),
        heads=layer.heads,
        kv_heads=kv_heads,
        dim=dim,
        rotary_dim=rotary_dim,
        query_norm=pointer(layer.query_norm),
        key_norm=pointer(layer.key_norm),
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


def product(linear: Linear, output: str, norm: NormWeight | None = None, activation: str = "silu") -> Product:
    """A product by a layer's weight, but for its rows."""
    n, k = linear.weight.shape
    _, epsilon, offset = norm or (None, 0.0, 0.0)
    weight = linear.native_weight()
    is_packed = isinstance(weight, torch.Tensor)
    return Product(
        x_stride=k,
        norm=pointer(norm),
        epsilon=epsilon,
        norm_offset=offset,
        packed=weight.data_ptr() if is_packed else None,
        quantized=NOT_QUANTIZED if is_packed else weight,
        n=n,
        k=k,
        bias=None if linear.bias is None else linear.bias.data_ptr(),
        output=OUTPUTS[output],
        activation=ACTIVATIONS[activation],
        out_stride=n // 2 if output == "gated" else n,
    )


def pointer(norm: NormWeight | None) -> int | None:
    return None if norm is None else norm[0].data_ptr()
