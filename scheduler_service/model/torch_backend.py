"""The operations of a decoder in torch, on any device; on a CPU with packed weights."""

from collections.abc import Callable, Sequence
from typing import cast

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.reference import layers as plain_layers
from quartet.scheduler_service.model.activations import activations
from quartet.scheduler_service.model.backend import Rotation
from quartet.scheduler_service.model.batch import Attend, PagedAttend, PagedContext
from quartet.scheduler_service.model.deterministic import sigmoid as steady_sigmoid
from quartet.scheduler_service.model.layers import Attention, DecoderLayer, Mlp, Moe, Norm
from quartet.scheduler_service.model.projections import arranged, attend_read
from quartet.scheduler_service.model.sharded import norm_over_ranks
from quartet.scheduler_service.model.spec import RopeSpec
from quartet.scheduler_service.sampling import choose
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows


class TorchBackend:
    """A model.backend.Backend whose contexts are functions (model.batch.Attend)."""

    def __init__(
        self, ropes: Sequence[RopeSpec], dtype: torch.dtype, device: torch.device, deterministic: bool = False
    ) -> None:
        self.deterministic = deterministic
        self.dtype = dtype
        self.ropes = [(torch.tensor(rope.frequencies, device=device), rope.factor) for rope in ropes]
        self.activations = activations(deterministic)
        self.sigmoid = steady_sigmoid if deterministic else torch.sigmoid
        self.on_rows: Callable[[torch.Tensor | None], None] | None = None

    def reserve(self, layers: list[DecoderLayer], lm_head: Linear | None) -> None:
        """Nothing: every operation takes the memory that it needs."""

    def watch_rows(self, on_rows: Callable[[torch.Tensor | None], None]) -> None:
        """Have this hear which rows of a step the next products are of, see plain_layers.run_experts."""
        self.on_rows = on_rows

    def rotations(self, positions: torch.Tensor) -> list[Rotation]:
        return [plain_layers.rotation(positions, *rope, self.dtype) for rope in self.ropes]

    def normed(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """x (tokens, …, size) by a norm over its last dimension; as it is without one."""
        if norm is None:
            return x
        if norm.ranks is not None:
            return norm_over_ranks(x, norm.weight, norm.epsilon, norm.ranks)
        if norm.centred:
            return plain_layers.layer_norm(x, norm.weight, norm.epsilon)
        function = plain_layers.rms_norm_plus_one if norm.plus_one else plain_layers.rms_norm
        return function(x, norm.weight, norm.epsilon)

    def run_layers(
        self,
        layers: list[DecoderLayer],
        residual: torch.Tensor,
        rotations: list[Rotation],
        context: Attend | PagedContext,
        inputs: torch.Tensor | None = None,
        stack: torch.Tensor | None = None,
        final: Norm | None = None,
    ) -> torch.Tensor | None:
        """As the protocol has it: never at once."""
        return None

    def attend(
        self,
        residual: torch.Tensor,
        norm: Norm | None,
        attention: Attention,
        rotation: Rotation,
        context: Attend | PagedContext,
        query_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See model.backend.Backend.attend."""
        if attention.output_gate:
            return self.attend_gated(residual, norm, attention, rotation, context)
        if attention.reads:
            queries = attention.qkv(self.normed(residual, norm))
            return attend_read(queries, attention, rotation, cast(PagedAttend, context), self.normed)
        spec, tokens = attention.spec, len(residual)
        heads, kv_heads = spec.heads, spec.kv_heads
        projected = arranged(attention.qkv(self.normed(residual, norm)), attention, self.normed)
        query_key, value = projected.view(tokens, -1, spec.head_dim).split((heads + kv_heads, kv_heads), dim=1)
        query, key = plain_layers.rotate(query_key, *rotation).split((heads, kv_heads), dim=1)
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)
        return cast(Attend, context)(spec, query, key, value).reshape(tokens, -1)

    def attend_gated(
        self,
        residual: torch.Tensor,
        norm: Norm | None,
        attention: Attention,
        rotation: Rotation,
        context: Attend | PagedContext,
    ) -> torch.Tensor:
        """`attend` where each head's query comes with a gate, whose sigmoid scales what the head gives."""
        spec = attention.spec
        projected = attention.qkv(self.normed(residual, norm)).unflatten(-1, (-1, spec.head_dim))
        queries, key, value = projected.split((2 * spec.heads, spec.kv_heads, spec.kv_heads), dim=1)
        query, gate = self.normed(queries[:, ::2], attention.query_norm), queries[:, 1::2]
        turned = plain_layers.rotate(torch.cat((query, self.normed(key, attention.key_norm)), dim=1), *rotation)
        query, key = turned.split((spec.heads, spec.kv_heads), dim=1)
        mixed = cast(Attend, context)(spec, query, key, value)
        return (mixed * self.sigmoid(gate).to(mixed.dtype)).flatten(1)

    def add_product(self, residual: torch.Tensor, x: torch.Tensor, linear: Linear, norm: Norm | None) -> None:
        residual.add_(self.normed(linear(x), norm))

    def gate_up(self, residual: torch.Tensor, norm: Norm | None, gate_up: Linear, activation: str) -> torch.Tensor:
        return self.activations[activation](gate_up(self.normed(residual, norm)))

    def gated(self, gate: torch.Tensor, factor: torch.Tensor, activation: str) -> torch.Tensor:
        return self.activations[activation](torch.cat((gate, factor), dim=1))

    def add_experts(self, residual: torch.Tensor, before: Norm | None, moe: Moe, after: Norm | None) -> torch.Tensor:
        """See model.backend.Backend.add_experts; ranks that have parts of the experts are summed once, behind all."""
        x = self.normed(residual, before)
        weights, ids = self.choose_experts(
            x if moe.router_norm is None else self.normed(residual, moe.router_norm), moe
        )
        activation = self.activations[moe.activation]
        experts = moe.gate_up, moe.down, activation, self.on_rows, moe.spec.scales_inputs
        y, shared = plain_layers.run_experts(x, weights, ids, *experts), None
        if moe.shared is not None and moe.shared_gate is not None:
            y = torch.addcmul(y, self.sigmoid(moe.shared_gate(x)).to(x.dtype), self.mlp(x, moe.shared))
        elif moe.shared is not None:
            shared = self.mlp(x if moe.shared_before is None else self.normed(residual, moe.shared_before), moe.shared)
        residual.add_(self.normed(self.joined(moe, y, shared), after))
        return ids

    def joined(self, moe: Moe, y: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
        """The sum of what the experts and the shared one give, (tokens, hidden) each; ranks are summed before norms."""
        if shared is not None and (moe.after is not None or moe.shared_after is not None):
            if moe.ranks is not None:
                y, shared = moe.ranks.sum(torch.stack((y, shared))).unbind()
            return self.normed(y, moe.after) + self.normed(shared, moe.shared_after)
        y = y if shared is None else y + shared
        return self.normed(y if moe.ranks is None else moe.ranks.sum(y), moe.after)

    def choose_experts(self, x: torch.Tensor, moe: Moe) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (float32) and ids of the experts of x (tokens, hidden), both (tokens, top_k), best first."""
        spec = moe.spec
        if spec.chooses_plainly:
            return plain_layers.choose_experts(moe.router(x), spec.top_k, spec.renormalize)
        logits = x.new_empty(len(x), spec.experts, dtype=torch.float32)
        moe.router.write(x, logits)
        if spec.router_scale != 1.0:
            logits *= spec.router_scale
        scores = logits.softmax(dim=-1) if spec.scoring == "softmax" else self.sigmoid(logits)
        choice = spec.top_k, spec.renormalize, spec.groups, spec.top_groups, spec.group_best
        weights, ids = plain_layers.choose_scored_experts(scores, moe.score_bias, *choice)
        if moe.expert_scale is not None:
            weights = weights * moe.expert_scale.float()[ids]
        return weights * spec.scale, ids

    def mlp(self, x: torch.Tensor, mlp: Mlp) -> torch.Tensor:
        return mlp.down(self.gate_up(x, None, mlp.gate_up, mlp.activation))

    def write_logits(
        self, hidden: torch.Tensor, lm_head: Linear, scale: float, softcap: float | None, out: torch.Tensor
    ) -> None:
        lm_head.write(hidden, out)
        if scale != 1.0:
            out.mul_(scale)
        if softcap is not None:
            out.copy_(plain_layers.soft_cap(out, softcap))

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        return choose.sample(logits, rows, allowed, keep_logits)
