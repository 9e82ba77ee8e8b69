"""The generic decoder on fused operations: the same weights and the same answers, in a few launches a layer.

    up to 4 tokens     norm+QKV+rotate+write, attend, output+residual, norm+gate/up+activate, down+residual
    up to 64           norm, skinny QKV, rotate+write, attend, skinny output+residual, norm, skinny gate/up, skinny down
    more               the same with cuBLAS for the four products

The residual stream is one tensor that the products add to. Nothing here waits for the device and no shape depends on
a value, so a forward pass can be recorded in a graph; a mixture of experts is the exception (`recordable`).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.configs import FEW_ROWS, SKINNY_ROWS
from kernels.linear import Linear
from kernels.ops import Backend, Ops, resolve
from scheduler_service.model.batch import Batch, PagedContext
from scheduler_service.model.decoder import Decoder, DecoderLayer
from scheduler_service.model.layers import Mlp, Norm
from scheduler_service.model.rope import position_tables
from scheduler_service.model.spec import DecoderSpec

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
Sizes = Callable[..., tuple[int, int]]  # elements of partial sums and of counters


class Workspace:
    """Scratch memory of operations that add up partial results. They follow one another, so they share it."""

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.device = device
        self.counters = torch.zeros(1, dtype=torch.int32, device=device)
        self.decode, self.skinny = sizes_of(backend)

    def reserve(self, counters: int) -> None:
        """Have at least so many counters. Before anything is recorded: recorded work keeps the address."""
        if counters > len(self.counters):
            self.counters = torch.zeros(counters, dtype=torch.int32, device=self.device)

    def partials(self, sizes: tuple[int, int]) -> torch.Tensor:
        assert sizes[1] <= len(self.counters), sizes
        return torch.empty(sizes[0], dtype=torch.float32, device=self.device)


def sizes_of(backend: Backend) -> tuple[Sizes, Sizes]:
    """What paged decode and the skinny products need; plain torch needs nothing."""
    if backend == "torch":
        return lambda *_: (0, 0), lambda *_: (0, 0)
    from kernels.triton_attention_decode import decode_workspace  # triton is not there on every machine
    from kernels.triton_skinny import skinny_workspace

    return decode_workspace, skinny_workspace


class Products:
    """x @ weight.T by the route for its number of rows."""

    def __init__(self, ops: Ops, workspace: Workspace) -> None:
        self.ops = ops
        self.workspace = workspace

    def reserve(self, linear: Linear, gated: bool = False) -> None:
        """Have room for the products with this weight."""
        size = len(linear.weight) // (2 if gated else 1)
        self.workspace.reserve(self.workspace.skinny(SKINNY_ROWS, size, linear.weight.shape[1], gated)[1])

    def scratch(self, x: torch.Tensor, size: int, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = self.workspace.skinny(len(x), size, x.shape[1], gated)
        return self.workspace.partials(sizes), self.workspace.counters

    def __call__(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """(tokens, in) → (tokens, out)."""
        if len(x) > SKINNY_ROWS:
            return F.linear(x, linear.weight, linear.bias)
        out = x.new_empty(len(x), len(linear.weight))
        self.small(x, linear, None, out)
        return out

    def write(self, x: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
        """The same into `out`, which may have another dtype."""
        if len(x) > SKINNY_ROWS:
            out.copy_(F.linear(x, linear.weight, linear.bias))
        else:
            self.small(x, linear, None, out)

    def add(self, x: torch.Tensor, linear: Linear, residual: torch.Tensor) -> None:
        """residual (tokens, out) += the product."""
        if len(x) <= SKINNY_ROWS:
            self.small(x, linear, residual, residual)
            return
        torch.addmm(residual, x, linear.weight.t(), out=residual)
        if linear.bias is not None:
            residual.add_(linear.bias)

    def small(self, x: torch.Tensor, linear: Linear, residual: torch.Tensor | None, out: torch.Tensor) -> None:
        if len(x) <= FEW_ROWS:
            self.ops.gemv(x, linear.weight, linear.bias, residual, out)
        else:
            scratch = self.scratch(x, out.shape[1], gated=False)
            self.ops.skinny(x, linear.weight, linear.bias, residual, *scratch, out)

    def gated(self, x: torch.Tensor, linear: Linear, activation: str) -> torch.Tensor:
        """activation(gate) * up of x (tokens, in)."""
        size = len(linear.weight) // 2
        out = x.new_empty(len(x), size)
        if len(x) > SKINNY_ROWS:
            self.ops.gated_activation(F.linear(x, linear.weight, linear.bias), activation, out)
        elif len(x) > FEW_ROWS:
            scratch = self.scratch(x, size, gated=True)
            self.ops.skinny_gated(x, linear.weight, linear.bias, activation, *scratch, out)
        else:
            self.ops.norm_gate_up(x, None, 0.0, False, linear.weight, linear.bias, activation, out)
        return out


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
        self.fuses_attention = whole_heads and layer.before_attention is not None
        self.fuses_mlp = layer.moe is None and layer.before_mlp is not None and layer.after_mlp is None
        for linear in (layer.attention.qkv, layer.attention.output):
            products.reserve(linear)
        if layer.moe is None:
            products.reserve(layer.mlp.gate_up, gated=True)
            products.reserve(layer.mlp.down)

    def __call__(self, residual: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], batch: Batch) -> None:
        few = len(residual) <= FEW_ROWS
        context: PagedContext = batch.attend
        attention = self.layer.attention
        q = self.queries(residual, rotation, context, few and self.fuses_attention)
        mixed = torch.empty_like(q)
        context.attend(self.facts, q, mixed)
        self.add(mixed.flatten(1), attention.output, self.layer.after_attention, residual)
        if self.layer.moe is not None:
            self.add_experts(residual, batch)
        elif few and self.fuses_mlp:
            self.add_mlp_of_few(residual, self.layer.mlp)
        else:
            y = self.products.gated(
                self.normed(residual, self.layer.before_mlp), self.layer.mlp.gate_up, self.activation
            )
            self.add(y, self.layer.mlp.down, self.layer.after_mlp, residual)

    def queries(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], context: PagedContext, in_one: bool
    ) -> torch.Tensor:
        """Rotated queries (tokens, heads, dim); keys and values are in the pool afterwards."""
        attention, pools = self.layer.attention, context.pools(self.facts.layer)
        q = x.new_empty(len(x), self.facts.heads, self.facts.head_dim)
        norms = (norm and norm.weight for norm in (attention.query_norm, attention.key_norm))
        rest = (*norms, *rotation, context.places, *pools, q)
        qkv = attention.qkv
        if in_one:
            norm = self.layer.before_attention.weight
            self.ops.norm_qkv_rope_kv(x, norm, self.epsilon, self.plus_one, qkv.weight, qkv.bias, *rest)
        else:
            projected = self.products(self.normed(x, self.layer.before_attention), qkv)
            query_norm, key_norm, *rest = rest
            self.ops.rope_kv(projected, query_norm, key_norm, self.epsilon, self.plus_one, *rest)
        return q

    def add_mlp_of_few(self, residual: torch.Tensor, mlp: Mlp) -> None:
        gate_up, norm = mlp.gate_up, self.layer.before_mlp.weight
        y = residual.new_empty(len(residual), len(gate_up.weight) // 2)
        self.ops.norm_gate_up(
            residual, norm, self.epsilon, self.plus_one, gate_up.weight, gate_up.bias, self.activation, y
        )
        self.products.add(y, mlp.down, residual)

    def add_experts(self, residual: torch.Tensor, batch: Batch) -> None:
        record = partial(batch.record_experts, self.layer.layer) if batch.record_experts else None
        y = self.layer.moe(self.normed(residual, self.layer.before_mlp), record)
        residual.add_(y if self.layer.after_mlp is None else self.normed(y, self.layer.after_mlp))

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

    def __init__(self, model: Decoder, backend: Backend, context_length: int) -> None:
        self.model = model
        self.spec, self.weights = model.spec, model.weights
        self.attention, self.dtype, self.device = model.attention, model.dtype, model.device
        self.hidden_size, self.vocab_size = model.hidden_size, model.vocab_size
        self.ops = resolve(model.device.type, backend)
        self.workspace = Workspace(backend, model.device)
        self.products = Products(self.ops, self.workspace)
        self.tables = [position_tables(*rotary, context_length, self.dtype) for rotary in model.rotary]
        rotary_dims = [2 * len(rope.frequencies) for rope in model.spec.ropes]
        self.layers = [
            FusedLayer(model.spec, layer, self.products, rotary_dims[layer.rope] == model.spec.head_dim)
            for layer in model.layers
        ]
        self.products.reserve(model.lm_head)

    @property
    def recordable(self) -> bool:
        """Whether a forward pass never waits for the device."""
        return not any(layer.moe for layer in self.spec.layers)

    def reserve(self, rows: int) -> None:
        """Have counters for decode steps of so many rows."""
        self.workspace.reserve(rows * self.spec.kv_heads)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm: (tokens, hidden)."""
        residual = self.model.embed(batch)
        rotations = [tuple(table.index_select(0, batch.positions) for table in tables) for tables in self.tables]
        for layer in self.layers:
            layer(residual, rotations[layer.layer.rope], batch)
        return self.layers[-1].normed(residual, self.model.norm)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) → float32 (rows, vocab), into `out` if there is one."""
        if out is None:
            out = hidden.new_empty(len(hidden), self.vocab_size, dtype=torch.float32)
        self.products.write(hidden, self.model.lm_head, out)
        cap = self.spec.logit_softcap
        return out if cap is None else out.copy_(reference.soft_cap(out, cap))


def can_fuse(model: object) -> bool:
    """Whether the fused operations cover this model."""
    return (
        isinstance(model, Decoder)
        and model.spec.generates
        and model.spec.causal
        and model.spec.activation in ACTIVATIONS
    )
