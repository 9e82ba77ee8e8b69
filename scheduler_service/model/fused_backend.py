"""The operations of a decoder on fused operations: the same answers, in a few launches a layer.

    up to 4 tokens     norm+QKV+rotate+write, attend, output+residual, norm+gate/up+activate, down+residual
    up to 64           norm, skinny QKV, rotate+write, attend, skinny output+residual, norm, skinny gate/up, skinny down
    more               the same with cuBLAS for the four products
    with adapters      norm, product, shrink and expand (fused_adapters.py), then what follows

Nothing here waits for the device and no shape depends on a value, so a forward pass can be recorded in a graph.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.ops import Implementation, resolve
from quartet.kernels.reference.layers import layer_norm, soft_cap
from quartet.kernels.triton.configs import SKINNY_ROWS
from quartet.scheduler_service.model.adapter_pool import AdapterPool
from quartet.scheduler_service.model.backend import Rotation
from quartet.scheduler_service.model.batch import Attend, PagedContext
from quartet.scheduler_service.model.fused_adapters import FusedAdapters, StepTiles
from quartet.scheduler_service.model.fused_moe import FusedMoe
from quartet.scheduler_service.model.fused_sampling import FusedSampling, PlainDraws
from quartet.scheduler_service.model.layers import Attention, DecoderLayer, Moe, Norm
from quartet.scheduler_service.model.products import Products, Workspace
from quartet.scheduler_service.model.projections import arranged
from quartet.scheduler_service.model.rope import position_tables
from quartet.scheduler_service.model.spec import DecoderSpec, MoeSpec, RopeSpec
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class FusedBackend:
    """A model.backend.Backend whose contexts are PagedContexts."""

    def __init__(
        self,
        ropes: Sequence[RopeSpec],
        dtype: torch.dtype,
        device: torch.device,
        implementation: Implementation,
        context_length: int,
        dependent: bool = False,
        deterministic: bool = False,
        pool: AdapterPool | None = None,
    ) -> None:
        """`implementation`, `dependent`: see quartet.kernels.ops.resolve. `pool`: of LoRA adapters, if any."""
        self.deterministic = deterministic
        self.ops = resolve(device.type, implementation, dependent)
        self.workspace = Workspace(implementation, device, SKINNY_ROWS if deterministic else None)
        self.adapters = None if pool is None else FusedAdapters(self.ops, pool)
        self.products = Products(self.ops, self.workspace, deterministic, self.adapters)
        self.moe = FusedMoe(self.products)
        self.sampling = FusedSampling(self.products)
        self.tables = [
            torch.cat(position_tables(frequencies(rope, device), rope.factor, context_length, dtype), 1)
            for rope in ropes
        ]  # each (context_length, 2, rotary_dim): cosines, signed sines

    def reserve(self, layers: list[DecoderLayer], lm_head: Linear | None) -> None:
        """See model.backend.Backend.reserve."""
        for layer in layers:
            assert isinstance(layer.attention, Attention), "see can_fuse"
            self.products.reserve(layer.attention.qkv)
            self.products.reserve(layer.attention.output)
            block = layer.feed_forward
            assert block is not None, "see can_fuse"
            if isinstance(block, Moe):
                self.moe.reserve(block)
            else:
                self.products.reserve(block.gate_up, gated=True)
                self.products.reserve(block.down)
        if lm_head is not None:
            self.products.reserve(lm_head)

    def adapting(self, step: StepTiles | None) -> AbstractContextManager[None]:
        """Within it products add what the adapters of a step's tokens have; None: its tokens have none."""
        if step is None:
            return nullcontext()
        assert self.adapters is not None
        return self.adapters.of_step(step)

    def rotations(self, positions: torch.Tensor) -> list[Rotation]:
        return [self.rotation(rope, positions) for rope in range(len(self.tables))]

    def rotation(self, rope: int, positions: torch.Tensor) -> Rotation:
        """Cosines and signed sines of positions (tokens,): each (tokens, 1, rotary_dim)."""
        cos, sin = (half.index_select(0, positions) for half in self.tables[rope].split(1, 1))
        return cos, sin

    def normed(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        if norm is None:
            return x
        if norm.centred:
            return layer_norm(x, norm.weight, norm.epsilon)
        out = torch.empty_like(x)
        self.ops.rms_norm(x, norm.weight, norm.epsilon, norm.plus_one, out)
        return out

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
        paged = cast(PagedContext, context)
        q = self.queries(residual, norm, attention, rotation, paged)
        if query_scale is not None:
            q.mul_(query_scale.to(q.dtype))
        mixed = torch.empty_like(q)
        paged.attend(attention.spec, q, mixed)
        return mixed.flatten(1)

    def queries(
        self, x: torch.Tensor, norm: Norm | None, attention: Attention, rotation: Rotation, context: PagedContext
    ) -> torch.Tensor:
        """Rotated queries (tokens, heads, dim); keys and values are in the pool afterwards."""
        spec, qkv = attention.spec, attention.qkv
        q = x.new_empty(len(x), spec.heads, spec.head_dim)
        outputs = (*rotation, context.places, *context.pools(spec.layer), q)
        # A norm per head would need the whole head in one program: too few programs to read the weights at full speed.
        plain_heads = attention.query_norm is None and rotation[0].shape[2] == spec.head_dim and attention.is_plain
        fits = plain_heads and self.products.few(x) and not self.products.adds_adapters
        if norm is not None and not norm.centred and fits:
            self.ops.norm_qkv_rope_kv(x, norm.weight, norm.epsilon, norm.plus_one, qkv.weight, qkv.bias, *outputs)
            return q
        projected = self.products(self.normed(x, norm), qkv)
        query_norm, key_norm = attention.query_norm, attention.key_norm
        if not attention.is_plain:
            self.ops.rope_kv(arranged(projected, attention, self.normed), None, None, 0.0, False, *outputs)
        elif query_norm is None or key_norm is None:
            self.ops.rope_kv(projected, None, None, 0.0, False, *outputs)
        else:
            norms = query_norm.weight, key_norm.weight, query_norm.epsilon, query_norm.plus_one
            self.ops.rope_kv(projected, *norms, *outputs)
        return q

    def add_product(self, residual: torch.Tensor, x: torch.Tensor, linear: Linear, norm: Norm | None) -> None:
        if norm is None:
            self.products.add(x, linear, residual)
        else:
            residual.add_(self.normed(self.products(x, linear), norm))

    def gate_up(self, residual: torch.Tensor, norm: Norm | None, gate_up: Linear, activation: str) -> torch.Tensor:
        fits = self.products.few(residual) and not self.products.adds_adapters
        if norm is not None and not norm.centred and fits:
            y = residual.new_empty(len(residual), len(gate_up.weight) // 2)
            norms = norm.weight, norm.epsilon, norm.plus_one
            self.ops.norm_gate_up(residual, *norms, gate_up.weight, gate_up.bias, ACTIVATIONS[activation], y)
            return y
        return self.products.gated(self.normed(residual, norm), gate_up, ACTIVATIONS[activation])

    def gated(self, gate: torch.Tensor, factor: torch.Tensor, activation: str) -> torch.Tensor:
        out = torch.empty_like(gate)
        self.ops.gated_activation(torch.cat((gate, factor), dim=1), ACTIVATIONS[activation], out)
        return out

    def add_experts(self, residual: torch.Tensor, before: Norm | None, moe: Moe, after: Norm | None) -> torch.Tensor:
        assert before is not None and after is None, "see can_fuse"
        return self.moe.add(residual, before, moe, ACTIVATIONS[moe.activation])

    def write_logits(
        self, hidden: torch.Tensor, lm_head: Linear, scale: float, softcap: float | None, out: torch.Tensor
    ) -> None:
        self.products.write(hidden, lm_head, out)
        if scale != 1.0:
            out.mul_(scale)
        if softcap is not None:
            out.copy_(soft_cap(out, softcap))

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        return self.sampling.sample(logits, rows, allowed)

    def draw(
        self,
        residual: torch.Tensor,
        norm: Norm,
        lm_head: Linear,
        scale: float,
        softcap: float | None,
        plain: PlainDraws,
    ) -> None:
        """A token for each row of the residual stream (rows, hidden); can be recorded."""
        if len(residual) > SKINNY_ROWS or self.deterministic or scale != 1.0 or norm.centred:
            self.write_logits(self.normed(residual, norm), lm_head, scale, softcap, plain.logits)
            self.sampling.draw(plain)
        else:
            self.sampling.draw_with_head(residual, norm, lm_head, softcap, plain)


def frequencies(rope: RopeSpec, device: torch.device) -> torch.Tensor:
    """Radians per position, one for each pair of dimensions."""
    return torch.tensor(rope.frequencies, device=device)


def can_fuse(spec: DecoderSpec) -> bool:
    """Whether the fused operations cover a model."""
    plain_mixtures = (
        spec.names.before_mlp is not None
        and spec.names.after_mlp is None
        and spec.norm != "layer"
        and all(can_fuse_moe(layer.moe) for layer in spec.layers if layer.moe)
    )
    return (
        spec.generates
        and spec.causal
        and not spec.output_gate
        and spec.is_plain
        and not spec.is_recurrent  # their steps run operation by operation, and no graph is recorded
        and not spec.sinks
        and spec.latent is None
        and spec.activation in ACTIVATIONS
        and (plain_mixtures or not any(layer.moe for layer in spec.layers))
    )


def can_fuse_moe(moe: MoeSpec) -> bool:
    """Whether fused operations know this mixture: gated shared experts with a plain choice, others with scores."""
    if moe.router_bias or moe.expert_bias or moe.ungated or moe.scales_inputs:
        return False
    return not moe.shared_intermediate_size or moe.shared_gate == moe.chooses_plainly
