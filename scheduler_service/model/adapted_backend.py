"""The operations of a decoder to whose products something may be added: torch's, and our kernels between products."""

from typing import cast

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.scheduler_service.model.backend import Rotation
from quartet.scheduler_service.model.batch import Attend, PagedAttend, PagedContext
from quartet.scheduler_service.model.cpu_backend import attend_projected, can_rotate, norm_weight
from quartet.scheduler_service.model.layers import Attention, Norm
from quartet.scheduler_service.model.torch_backend import TorchBackend


class AdaptedBackend(TorchBackend):
    """A model.backend.Backend that computes every product by itself, so that adapters can add to it."""

    def product(self, residual: torch.Tensor, norm: Norm | None, linear: Linear) -> torch.Tensor:
        """linear(norm(residual)); with our kernels the norm is part of the products."""
        if not linear.has_kernel or (norm is not None and norm.centred):
            return linear(self.normed(residual, norm))
        y, weight = residual.new_empty(len(residual), len(linear.weight)), norm_weight(norm)
        linear.multiply_native(residual, y, "bf16", norm=weight)
        if linear.adapters is not None:
            linear.adapters.add(linear.slab, residual, y, weight)
        return y

    def add_product(self, residual: torch.Tensor, x: torch.Tensor, linear: Linear, norm: Norm | None) -> None:
        if norm is not None or not (linear.has_kernel and linear.is_whole):
            super().add_product(residual, x, linear, norm)
            return
        linear.multiply_native(x, residual, "add")
        if linear.adapters is not None:
            linear.adapters.add(linear.slab, x, residual)

    def gate_up(self, residual: torch.Tensor, norm: Norm | None, gate_up: Linear, activation: str) -> torch.Tensor:
        return self.activations[activation](self.product(residual, norm, gate_up))

    def attend(
        self,
        residual: torch.Tensor,
        norm: Norm | None,
        attention: Attention,
        rotation: Rotation,
        context: Attend | PagedContext,
        query_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See model.backend.Backend.attend; in bfloat16 one kernel norms heads, rotates and writes keys and values."""
        if not (self.dtype is torch.bfloat16 and can_rotate(attention, rotation) and hasattr(context, "pools")):
            return super().attend(residual, norm, attention, rotation, context, query_scale)
        qkv = self.product(residual, norm, attention.qkv)
        return attend_projected(qkv, attention, rotation, cast(PagedAttend, context), query_scale, self.normed)
