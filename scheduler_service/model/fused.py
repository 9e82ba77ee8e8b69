"""The generic decoder on fused operations: the same weights and the same answers, in a few launches a layer.

    up to 4 tokens     norm+QKV+rotate+write, attend, output+residual, norm+gate/up+activate, down+residual
    up to 64           norm, skinny QKV, rotate+write, attend, skinny output+residual, norm, skinny gate/up, skinny down
    more               the same with cuBLAS for the four products

The residual stream is one tensor that the products add to. Nothing here waits for the device and no shape depends on
a value, so a forward pass can be recorded in a graph.
"""

from functools import partial

import torch

from kernels import reference
from kernels.configs import SKINNY_ROWS
from kernels.linear import Linear
from kernels.ops import Backend, resolve
from scheduler_service.model.attention import Rotation
from scheduler_service.model.batch import Batch, PagedContext
from scheduler_service.model.decoder import Decoder, DecoderLayer
from scheduler_service.model.fused_moe import FusedMoe
from scheduler_service.model.layers import Mlp, Norm
from scheduler_service.model.products import Products, Workspace
from scheduler_service.model.rope import position_tables
from scheduler_service.model.spec import DecoderSpec

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class FusedLayer:
    """One layer. The residual stream (tokens, hidden) is changed in place."""

    def __init__(self, spec: DecoderSpec, layer: DecoderLayer, products: Products, whole_heads: bool) -> None:
        self.layer = layer
        self.facts = layer.attention.facts
        self.epsilon = spec.norm_epsilon
        self.plus_one = spec.norm == "rms_plus_one"
        self.activation = ACTIVATIONS[spec.activation]
        self.products = products
        self.ops = products.ops
        # A norm per head would need the whole head in one program: too few programs to read the weights at full speed.
        plain_heads = whole_heads and layer.attention.query_norm is None
        self.fuses_attention = plain_heads and layer.before_attention is not None
        self.fuses_mlp = layer.moe is None and layer.before_mlp is not None and layer.after_mlp is None
        for linear in (layer.attention.qkv, layer.attention.output):
            products.reserve(linear)
        self.moe: FusedMoe | None = None
        if layer.moe is None:
            products.reserve(layer.mlp.gate_up, gated=True)
            products.reserve(layer.mlp.down)
        else:
            self.moe = FusedMoe(layer.moe, layer.before_mlp, self.plus_one, self.activation, products)

    def __call__(self, residual: torch.Tensor, rotation: Rotation, batch: Batch) -> None:
        few = self.products.few(residual)
        context: PagedContext = batch.attend
        attention = self.layer.attention
        q = self.queries(residual, rotation, context, few and self.fuses_attention)
        mixed = torch.empty_like(q)
        context.attend(self.facts, q, mixed)
        self.add(mixed.flatten(1), attention.output, self.layer.after_attention, residual)
        if self.moe is not None:
            self.moe(residual, partial(batch.record_experts, self.layer.layer) if batch.record_experts else None)
        elif few and self.fuses_mlp:
            self.add_mlp_of_few(residual, self.layer.mlp)
        else:
            y = self.products.gated(
                self.normed(residual, self.layer.before_mlp), self.layer.mlp.gate_up, self.activation
            )
            self.add(y, self.layer.mlp.down, self.layer.after_mlp, residual)

    def queries(self, x: torch.Tensor, rotation: Rotation, context: PagedContext, in_one: bool) -> torch.Tensor:
        """Rotated queries (tokens, heads, dim); keys and values are in the pool afterwards."""
        attention, pools = self.layer.attention, context.pools(self.facts.layer)
        q = x.new_empty(len(x), self.facts.heads, self.facts.head_dim)
        rest = (*rotation, context.places, *pools, q)
        qkv = attention.qkv
        if in_one:
            norm = self.layer.before_attention.weight
            self.ops.norm_qkv_rope_kv(x, norm, self.epsilon, self.plus_one, qkv.weight, qkv.bias, *rest)
        else:
            projected = self.products(self.normed(x, self.layer.before_attention), qkv)
            norms = (norm and norm.weight for norm in (attention.query_norm, attention.key_norm))
            self.ops.rope_kv(projected, *norms, self.epsilon, self.plus_one, *rest)
        return q

    def add_mlp_of_few(self, residual: torch.Tensor, mlp: Mlp) -> None:
        gate_up, norm = mlp.gate_up, self.layer.before_mlp.weight
        y = residual.new_empty(len(residual), len(gate_up.weight) // 2)
        self.ops.norm_gate_up(
            residual, norm, self.epsilon, self.plus_one, gate_up.weight, gate_up.bias, self.activation, y
        )
        self.products.add(y, mlp.down, residual)

    def add(self, x: torch.Tensor, linear: Linear, norm: Norm | None, residual: torch.Tensor) -> None:
        """residual += linear(x), normed first where the family has a norm there."""
        if norm is None:
            self.products.add(x, linear, residual)
        else:
            residual.add_(self.normed(self.products(x, linear), norm))

    def normed(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        if norm is None:
            return x
        out = torch.empty_like(x)
        self.ops.add_rms_norm(x, None, norm.weight, self.epsilon, self.plus_one, out)
        return out


class FusedDecoder:
    """A ServedModel whose batches attend through a PagedContext."""

    def __init__(
        self,
        model: Decoder,
        backend: Backend,
        context_length: int,
        dependent: bool = False,
        steady: bool = False,
    ) -> None:
        """`dependent`: see kernels.ops.resolve. `steady`: a token's bits do not depend on what shares its step."""
        self.model = model
        self.spec, self.weights = model.spec, model.weights
        self.attention, self.dtype, self.device = model.attention, model.dtype, model.device
        self.hidden_size, self.vocab_size = model.hidden_size, model.vocab_size
        self.ops = resolve(model.device.type, backend, dependent)
        self.steady = steady
        self.workspace = Workspace(backend, model.device, SKINNY_ROWS if steady else None)
        self.products = Products(self.ops, self.workspace, steady)
        self.tables = [
            torch.cat(position_tables(*rotary, context_length, self.dtype), 1) for rotary in model.rotary
        ]  # each (context_length, 2, rotary_dim): cosines, signed sines
        rotary_dims = [2 * len(rope.frequencies) for rope in model.spec.ropes]
        self.layers = [
            FusedLayer(model.spec, layer, self.products, rotary_dims[layer.rope] == model.spec.head_dim)
            for layer in model.layers
        ]
        self.lm_head: Linear = model.lm_head
        self.products.reserve(self.lm_head)

    def reserve(self, rows: int) -> None:
        """Have counters for decode steps of so many rows."""
        self.workspace.reserve(rows * self.spec.kv_heads)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm: (tokens, hidden)."""
        residual = self.model.embed(batch)
        self.run_layers(residual, [self.rotation(i, batch.positions) for i in range(len(self.tables))], batch)
        return self.normed(residual)

    def rotation(self, rope: int, positions: torch.Tensor) -> Rotation:
        """Cosines and signed sines of positions (tokens,): each (tokens, 1, rotary_dim)."""
        cos, sin = (half.index_select(0, positions) for half in self.tables[rope].split(1, 1))
        return cos, sin

    def run_layers(self, residual: torch.Tensor, rotations: list[Rotation], batch: Batch) -> None:
        """All layers on the residual stream (tokens, hidden), in place; `rotations` by rope."""
        for layer in self.layers:
            layer(residual, rotations[layer.layer.rope], batch)

    def normed(self, residual: torch.Tensor) -> torch.Tensor:
        """The final norm."""
        return self.layers[-1].normed(residual, self.model.norm)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) → float32 (rows, vocab), into `out` if there is one."""
        if out is None:
            out = hidden.new_empty(len(hidden), self.vocab_size, dtype=torch.float32)
        self.products.write(hidden, self.lm_head, out)
        cap = self.spec.logit_softcap
        return out if cap is None else out.copy_(reference.soft_cap(out, cap))


def can_fuse(model: object) -> bool:
    """Whether the fused operations cover this model."""
    return (
        isinstance(model, Decoder)
        and model.spec.generates
        and model.spec.causal
        and model.spec.activation in ACTIVATIONS
        and all(layer.before_mlp and not layer.after_mlp for layer in model.layers if layer.moe is not None)
    )
