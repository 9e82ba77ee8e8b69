"""A second embedding of each token, with a part for every layer (per-layer embeddings of Gemma 3n and Gemma 4).

    part = (norm(W embedding / sqrt(hidden)) + its own row * sqrt(size)) / sqrt(2)      for all layers at once
    layer += norm(V (activation(G layer) * part))                                       behind each layer (OwnInput)

A token whose embedding came with the request has no row of its own: its part is the norm alone, as in transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native.quantized import QuantizedWeight
from quartet.scheduler_service.model.backend import Backend
from quartet.scheduler_service.model.batch import Batch
from quartet.scheduler_service.model.layers import Norm, OwnInput, embedding_of, linear, norm_of
from quartet.scheduler_service.model.spec import DecoderSpec, LayerInputSpec
from quartet.scheduler_service.weights.parameters import Layout, Weights

HALF_POWER = 2**-0.5


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """The second embeddings of a model."""

    spec: LayerInputSpec
    layers: int
    table: torch.Tensor | QuantizedWeight  # (vocabulary, layers * size), or what this rank has of it
    look_up: Callable[[torch.Tensor, torch.Tensor | QuantizedWeight], torch.Tensor]
    row_scale: float
    context: Linear  # (layers * size, hidden)
    context_scale: float
    norm: Norm

    def parts(self, batch: Batch, embeddings: torch.Tensor, compute: Backend) -> torch.Tensor:
        """The parts of all layers, (layers, tokens, size), from the model's embeddings (tokens, hidden)."""
        shape = self.layers, self.spec.size
        context = (self.context(embeddings) * self.context_scale).unflatten(1, shape)
        context = compute.normed(context.contiguous(), self.norm)
        parts: torch.Tensor = (context + self.rows(batch.input_ids).unflatten(1, shape)) * HALF_POWER
        if batch.embeds_mask is not None:
            parts = torch.where(batch.embeds_mask.view(-1, 1, 1), context, parts)
        return parts.transpose(0, 1).contiguous()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The tokens' rows of the table, scaled: (tokens, layers * size)."""
        ids = torch.where(ids < self.spec.vocabulary, ids, 0).long()
        return self.look_up(ids, self.table) * self.row_scale


def add_input(own: OwnInput, residual: torch.Tensor, part: torch.Tensor, compute: Backend) -> None:
    """Add to the residual stream (tokens, hidden) what a layer makes of its part (tokens, size)."""
    inner = compute.gated(own.gate(residual), part, own.activation)
    compute.add_product(residual, inner, own.projection, own.norm)


def input_of(own: OwnInput, x: torch.Tensor, part: torch.Tensor, compute: Backend) -> torch.Tensor:
    """What is to be added, made of x (tokens, hidden) in place of the residual stream."""
    return compute.normed(own.projection(compute.gated(own.gate(x), part, own.activation)), own.norm)


def layer_inputs_of(spec: DecoderSpec, weights: Weights) -> LayerInputs | None:
    """Those of a model, if it has such."""
    if (inputs := spec.layer_inputs) is None:
        return None
    return LayerInputs(
        spec=inputs,
        layers=len(spec.layers),
        table=weights.quantized_slab("embed_by_layer") or weights.slab("embed_by_layer"),
        look_up=embedding_of(weights, "embed_by_layer"),
        row_scale=float(torch.tensor(inputs.size**0.5, dtype=weights.dtype)),
        context=linear(weights, "layer_context"),
        context_scale=spec.hidden_size**-0.5,
        norm=norm_of(spec, weights, "layer_context_norm"),
    )


def add_layer_inputs(layout: Layout, spec: DecoderSpec, inputs: LayerInputSpec, tokens: int) -> None:
    """Places for the table, which has so many tokens here, and for what is made of the model's embeddings."""
    width, prefix = len(spec.layers) * inputs.size, spec.prefix
    layout.add("embed_by_layer", (), [(f"{prefix}embed_tokens_per_layer.weight", tokens)], width)
    layout.add("layer_context", (), [(f"{prefix}per_layer_model_projection.weight", width)], spec.hidden_size)
    layout.add("layer_context_norm", (), [(f"{prefix}per_layer_projection_norm.weight", inputs.size)], None)


def add_own_input(layout: Layout, spec: DecoderSpec, inputs: LayerInputSpec, layer: int, prefix: str) -> None:
    """Places for the tensors of one layer."""
    hidden = spec.hidden_size
    layout.add("layer_gate", (layer,), [(f"{prefix}per_layer_input_gate.weight", inputs.size)], hidden)
    layout.add("layer_projection", (layer,), [(f"{prefix}per_layer_projection.weight", hidden)], inputs.size)
    layout.add("after_layer_input", (layer,), [(f"{prefix}post_per_layer_input_norm.weight", hidden)], None)
