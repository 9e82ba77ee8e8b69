"""The operations of a decoder on our own CPU kernels, in bfloat16; torch's where there is none for a shape or kind.

    attend        norm + QKV product, head norms + rotation + writing of keys and values, attention
    add_product   product + residual
    gate_up       norm + product + gate

A row's bits do not depend on the rows beside it in any of these kernels.
"""

from collections.abc import Sequence
from typing import cast

import torch

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

    def reserve(self, layers: list[DecoderLayer], lm_head: Linear | None) -> None:
        """Nothing: the kernels keep what they need."""

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


def norm_weight(norm: Norm | None) -> native.NormWeight | None:
    """A norm as the kernels take it."""
    return None if norm is None else (norm.weight, norm.epsilon, float(norm.plus_one))
