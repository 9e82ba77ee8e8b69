"""The operations of a decoder to whose products something may be added: torch's, and our kernels between products."""

from typing import cast

import torch

from quartet.kernels.cpu.native import library as native
from quartet.scheduler_service.model.backend import Rotation
from quartet.scheduler_service.model.batch import Attend, PagedAttend, PagedContext
from quartet.scheduler_service.model.cpu_backend import norm_weight
from quartet.scheduler_service.model.layers import Attention, Norm
from quartet.scheduler_service.model.projections import arranged
from quartet.scheduler_service.model.torch_backend import TorchBackend


class AdaptedBackend(TorchBackend):
    """A model.backend.Backend that computes every product by itself, so that adapters can add to it."""

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
        spec, kernels = attention.spec, native.library() if self.dtype is torch.bfloat16 else None
        rotates = kernels is not None and kernels.can_rotate(spec.head_dim, rotation[0].shape[-1])
        if not rotates or attention.output_gate or not hasattr(context, "attend_written"):
            return super().attend(residual, norm, attention, rotation, context, query_scale)
        assert kernels is not None
        paged = cast(PagedAttend, context)
        qkv = attention.qkv(self.normed(residual, norm))
        norms = norm_weight(attention.query_norm), norm_weight(attention.key_norm)
        if not attention.is_plain:
            qkv, norms = arranged(qkv, attention, self.normed), (None, None)
        q = residual.new_empty(len(residual), spec.heads, spec.head_dim)
        kernels.rotate(qkv, *norms, *rotation, paged.places, *paged.pools(spec.layer), q)
        if query_scale is not None:
            q.mul_(query_scale.to(q.dtype))
        return paged.attend_written(spec, q).view(len(residual), -1)
