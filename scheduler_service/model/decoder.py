"""The generic decoder: any model of the Llama kind, from its spec, its weights and a backend."""

import copy
from dataclasses import replace
from typing import cast

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.scheduler_service.model import latent
from quartet.scheduler_service.model.backend import Backend, Rotation
from quartet.scheduler_service.model.batch import Attend, AttentionSpec, Batch, ExpertShape
from quartet.scheduler_service.model.heads import Head
from quartet.scheduler_service.model.layer_inputs import add_input, input_of, layer_inputs_of
from quartet.scheduler_service.model.layers import (
    Attention,
    DecoderLayer,
    LatentAttention,
    Mlp,
    Moe,
    Norm,
    decoder_layer,
    embedding_of,
    linear,
    norm_of,
)
from quartet.scheduler_service.model.sparsity import sparse
from quartet.scheduler_service.model.spec import DecoderSpec
from quartet.scheduler_service.model.state_access import StateSpec
from quartet.scheduler_service.model.streams import Streams, add_halves, streams_of
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows
from quartet.scheduler_service.weights.parameters import Weights


class Decoder:
    """A causal language model as the worker uses it."""

    def __init__(self, spec: DecoderSpec, weights: Weights, backend: Backend) -> None:
        self.spec = spec
        self.weights = weights
        self.dtype = weights.dtype
        self.device = weights.device
        self.hidden_size = spec.hidden_size
        self.vocab_size = spec.vocab_size
        self.embedding = weights.slab("embed")  # (vocab, hidden)
        self.quantized_embedding = weights.quantized_slab("embed")  # the same, if it is quantized
        self.look_up = embedding_of(weights)
        self.embedding_scale = spec.embedding_scale
        if spec.rounds_embedding_scale:
            self.embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=self.dtype))
        self.layers = [decoder_layer(spec, weights, index) for index in range(len(spec.layers))]
        self.layer_inputs = layer_inputs_of(spec, weights)
        self.streams = streams_of(spec, weights)
        if self.streams is not None:
            own = zip(self.layers, self.streams.layers, strict=True)
            self.layers = [replace(layer, streams=streams) for layer, streams in own]
        self.norm = norm_of(spec, weights, "norm")
        self.lm_head = linear(weights, "embed" if spec.tied else "lm_head") if spec.generates else None
        self.head = Head(spec.score_head, weights) if spec.score_head else None
        self.attention: list[AttentionSpec] = [layer.attention.spec for layer in self.layers if layer.keeps_kv]
        self.states: list[StateSpec] = [layer.recurrence.spec for layer in self.layers if layer.recurrence]
        self.backend = backend
        backend.reserve(self.layers, self.lm_head)

    def on(self, backend: Backend) -> "Decoder":
        """The same model, with the same weights, on another backend."""
        model = copy.copy(self)
        model.backend = backend
        backend.reserve(model.layers, model.lm_head)
        return model

    @property
    def experts(self) -> ExpertShape | None:
        """The mixtures that report to `Batch.record_experts`; None for a dense model."""
        mixtures = [layer.moe for layer in self.spec.layers if layer.moe]
        if not mixtures:
            return None
        return ExpertShape(len(self.layers), max(m.experts for m in mixtures), max(m.top_k for m in mixtures))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm: (tokens, hidden), or those of the tokens that `batch.attend` wants."""
        return self.run_layers(self.embed(batch), self.backend.rotations(batch.positions), batch, final=self.norm)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Token embeddings, or the request's own where it brought some: (tokens, hidden)."""
        x = self.look_up(batch.input_ids, self.quantized_embedding or self.embedding)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if batch.embeds is None or batch.embeds_mask is None:
            return x
        given = batch.embeds.to(x.dtype)
        if self.spec.scales_given_embeddings:
            given = given * self.embedding_scale
        return torch.where(batch.embeds_mask.unsqueeze(1), given, x)

    def run_layers(
        self, residual: torch.Tensor, rotations: list[Rotation], batch: Batch, final: Norm | None = None
    ) -> torch.Tensor:
        """All layers on the residual stream (tokens, hidden), in place; `rotations` by rope. Returns what is wanted of
        it, behind the norm `final`.
        """
        inputs = None if self.layer_inputs is None else self.layer_inputs.parts(batch, residual, self.backend)
        if self.streams is not None:
            self.run_streams(self.streams, residual, rotations, batch, inputs)
            return self.backend.normed(residual, final)
        if self.spec.factors is None and not batch.record_experts:
            found = self.backend.run_layers(self.layers, residual, rotations, batch.attend, inputs, final=final)
            if found is not None:
                return found
        scale = self.query_scale(batch.positions)
        for layer in self.layers:
            self.run_layer(layer, residual, rotations[layer.rope], batch, scale)
            if layer.own_input is not None and inputs is not None:
                add_input(layer.own_input, residual, inputs[layer.index], self.backend)
            if layer.scale is not None:
                residual.mul_(layer.scale)
        return self.backend.normed(residual, final)

    def run_streams(
        self,
        streams: Streams,
        residual: torch.Tensor,
        rotations: list[Rotation],
        batch: Batch,
        inputs: torch.Tensor | None,
    ) -> None:
        """All layers where the residual stream is one of several; `inputs`: the layers' own."""
        compute, stack = self.backend, streams.spread(residual)
        if compute.run_layers(self.layers, residual, rotations, batch.attend, inputs, stack) is not None:
            residual.copy_(streams.joined(stack))
            return
        for layer in self.layers:
            predicted = streams.predicted(layer.index, stack, compute)
            own = predicted[:, streams.spec.active].clone()
            self.run_layer(layer, own, rotations[layer.rope], batch)
            stack = streams.corrected(layer.index, predicted, own, compute)
            if layer.own_input is not None and inputs is not None:
                read = streams.read_by_input(layer.index, stack)
                streams.add_input(stack, input_of(layer.own_input, read, inputs[layer.index], compute))
        residual.copy_(streams.joined(stack))

    def run_layer(
        self,
        layer: DecoderLayer,
        residual: torch.Tensor,
        rotation: Rotation,
        batch: Batch,
        query_scale: torch.Tensor | None = None,
    ) -> None:
        """residual += attention, then residual += feed-forward, with the layer's norms before and after each."""
        compute = self.backend
        block = layer.feed_forward
        mixed = self.mixed(layer, residual, rotation, batch, query_scale)
        inner = self.inner(layer, block, residual) if layer.parallel and isinstance(block, Mlp) else None
        beside = None if self.streams is None else self.streams.beside(layer, residual, compute)
        for part, output in mixed:
            compute.add_product(residual, part, output, layer.after_attention)
        if beside is not None:
            add_halves(residual, beside)
        if isinstance(block, Moe):
            chosen = compute.add_experts(residual, layer.before_mlp, block, layer.after_mlp)
            if batch.record_experts:
                batch.record_experts(layer.index, chosen)
        elif block is not None:
            inner = self.inner(layer, block, residual) if inner is None else inner
            compute.add_product(residual, inner, block.down, layer.after_mlp)

    def mixed(
        self,
        layer: DecoderLayer,
        residual: torch.Tensor,
        rotation: Rotation,
        batch: Batch,
        query_scale: torch.Tensor | None,
    ) -> list[tuple[torch.Tensor, Linear]]:
        """What attention and the recurrence of a layer give, each with its output product."""
        compute, mixer, found = self.backend, layer.mixer, list[tuple[torch.Tensor, Linear]]()
        if isinstance(mixer, Attention):
            scale = query_scale if mixer.scales_queries else None
            heads = compute.attend(residual, layer.before_attention, mixer, rotation, batch.attend, scale)
            if self.spec.factors is not None:
                heads = heads * self.spec.factors.attention
            found.append((heads, mixer.output))
        elif isinstance(mixer, LatentAttention):
            x = compute.normed(residual, layer.before_attention)
            heads = latent.attend(x, mixer, rotation, cast(Attend, batch.attend), compute.normed)
            found.append((heads, mixer.output))
        if (recurrence := layer.recurrence) is not None:
            assert batch.states is not None
            x = compute.normed(residual, layer.before_attention)
            found.append((recurrence.mix(x, batch.states, compute.deterministic), recurrence.output))
        return found

    def inner(self, layer: DecoderLayer, block: Mlp, residual: torch.Tensor) -> torch.Tensor:
        """What the down product of a dense block reads: (tokens, size)."""
        compute, factors = self.backend, self.spec.factors
        if block.cutoff is not None:
            return sparse(block.gate_up(compute.normed(residual, layer.before_mlp)), block, compute.deterministic)
        if factors is None:
            return compute.gate_up(residual, layer.before_mlp, block.gate_up, block.activation)
        x = compute.normed(residual, layer.before_mlp) * factors.gate  # gates and what they scale
        return compute.gate_up(x, None, block.gate_up, block.activation) * (factors.down / factors.gate)

    def query_scale(self, positions: torch.Tensor) -> torch.Tensor | None:
        """What queries at some positions are multiplied with, (tokens, 1, 1) float32; None for one."""
        if (scale := self.spec.query_scale) is None:
            return None
        steps = (positions + scale.first).div(scale.length, rounding_mode="floor")
        return (1 + scale.beta * torch.log1p(steps)).view(-1, 1, 1)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) → float32 (rows, vocab), into `out` if there is one."""
        assert self.lm_head is not None, "an embedder predicts no next token"
        if out is None:
            out = hidden.new_empty(len(hidden), self.vocab_size, dtype=torch.float32)
        self.backend.write_logits(hidden, self.lm_head, self.spec.logit_scale, self.spec.logit_softcap, out)
        return out

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        """One token per row of logits (rows, vocab): see Backend.sample."""
        return self.backend.sample(logits, rows, allowed, keep_logits)
