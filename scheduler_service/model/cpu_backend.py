"""The operations of a decoder on our own CPU kernels, in bfloat16; torch's where there is none for a shape or kind.

    run_layers    all layers in one call, where there is a kernel for everything that they do; else
    attend        norm + QKV product, head norms + rotation + writing of keys and values, attention
    add_product   product + residual
    gate_up       norm + product + gate

A row's bits do not depend on the rows beside it in any of these kernels.
"""

from collections.abc import Sequence
from typing import cast

import torch

from quartet.kernels.cpu.layers import Layer, Layers
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native import library as native
from quartet.scheduler_service.model.backend import Rotation
from quartet.scheduler_service.model.batch import Attend, PagedAttend, PagedContext
from quartet.scheduler_service.model.layers import Attention, DecoderLayer, Moe, Norm
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
        self.together: Layers | None = None  # the layers of a model, if they can be computed in one call
        self.looked_at: list[DecoderLayer] | None = None  # those layers

    def reserve(self, layers: list[DecoderLayer], lm_head: Linear | None) -> None:
        """Nothing: the kernels keep what they need."""

    def run_layers(
        self,
        layers: list[DecoderLayer],
        residual: torch.Tensor,
        rotations: list[Rotation],
        context: Attend | PagedContext,
    ) -> bool:
        """As the protocol has it: where the context attends with our kernel, and this knows all of the layers."""
        if self.looked_at is not layers:  # not before: the kernels may be compiled beside the start
            self.looked_at, self.together = layers, layers_together(layers, self.rotary_dims)
        if self.together is None or not hasattr(context, "page_table"):
            return False
        paged = cast(PagedAttend, context)
        if (table := paged.page_table()) is None:
            return False
        pools = [paged.pools(layer.attention.spec.layer) for layer in layers]
        self.together.run(residual, rotations, paged.places, table, pools)
        return True

    def rotations(self, positions: torch.Tensor) -> list[Rotation]:
        return self.torch.rotations(positions)

    def normed(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return self.torch.normed(x, norm)

    def attend(
        self,
        residual: torch.Tensor,
        norm: Norm | None,
        attention: Attention,
        rotation: Rotation,
        context: Attend | PagedContext,
    ) -> torch.Tensor:
        """As the protocol has it: three calls of our kernels, or torch where one of them cannot do it."""
        spec, kernels = attention.spec, native.library()
        rotates = kernels is not None and kernels.can_rotate(spec.head_dim, rotation[0].shape[-1])
        if not (rotates and attention.qkv.is_native and hasattr(context, "attend_written")):
            return self.torch.attend(residual, norm, attention, rotation, context)
        assert kernels is not None
        paged = cast(PagedAttend, context)
        qkv = residual.new_empty(len(residual), (spec.heads + 2 * spec.kv_heads) * spec.head_dim)
        attention.qkv.multiply_native(residual, qkv, "bf16", norm=norm_weight(norm))
        q = residual.new_empty(len(residual), spec.heads, spec.head_dim)
        norms = norm_weight(attention.query_norm), norm_weight(attention.key_norm)
        kernels.rotate(qkv, *norms, *rotation, paged.places, *paged.pools(spec.layer), q)
        return paged.attend_written(spec, q).view(len(residual), -1)

    def add_product(self, residual: torch.Tensor, x: torch.Tensor, linear: Linear, norm: Norm | None) -> None:
        if linear.is_native and norm is None:
            linear.multiply_native(x, residual, "add")
        else:
            self.torch.add_product(residual, x, linear, norm)

    def gate_up(self, residual: torch.Tensor, norm: Norm | None, gate_up: Linear, activation: str) -> torch.Tensor:
        size = len(gate_up.weight)
        if not (gate_up.is_native and activation in GATES and native.can_gate(size)):
            return self.torch.gate_up(residual, norm, gate_up, activation)
        out = residual.new_empty(len(residual), size // 2)
        gate_up.multiply_native(residual, out, "gated", GATES[activation], norm_weight(norm))
        return out

    def add_experts(self, residual: torch.Tensor, before: Norm | None, moe: Moe, after: Norm | None) -> torch.Tensor:
        return self.torch.add_experts(residual, before, moe, after)

    def write_logits(self, hidden: torch.Tensor, lm_head: Linear, softcap: float | None, out: torch.Tensor) -> None:
        self.torch.write_logits(hidden, lm_head, softcap, out)

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        return self.torch.sample(logits, rows, allowed, keep_logits)


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
    attention, block = layer.attention, layer.feed_forward
    spec = attention.spec
    if isinstance(block, Moe) or layer.after_attention or layer.after_mlp or spec.sinks is not None:
        return None
    return Layer(
        qkv=attention.qkv,
        output=attention.output,
        gate_up=block.gate_up,
        down=block.down,
        before_attention=norm_weight(layer.before_attention),
        before_mlp=norm_weight(layer.before_mlp),
        query_norm=norm_weight(attention.query_norm),
        key_norm=norm_weight(attention.key_norm),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        causal=spec.causal,
        activation=GATES.get(block.activation, ""),
        rope=layer.rope,
    )


def norm_weight(norm: Norm | None) -> native.NormWeight | None:
    """A norm as the kernels take it."""
    return None if norm is None else (norm.weight, norm.epsilon, float(norm.plus_one))
