"""Several residual streams, of which layers read one (alternating updates), and a product of low rank beside attention.

    predicted = streams + C(x) streams            C: (count, count), from the stream x that is read
    layer     = as any other on predicted[active], but for (x + attention + x' + norm(B A x')) / sqrt(2), x' = norm(x)
    corrected = predicted + c(layer) (layer - predicted[active])                       c: (count,)

The other streams begin and end as products of the one, as long as that. See Baykal et al., "Alternating updates for
efficient transformers", 2023; the specification is Gemma 3n in transformers.
"""

from dataclasses import dataclass

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.scheduler_service.model.backend import Backend
from quartet.scheduler_service.model.layers import DecoderLayer, OwnStreams, linear, norm_of
from quartet.scheduler_service.model.spec import DecoderSpec, StreamSpec
from quartet.scheduler_service.weights.parameters import Layout, Weights

HALF_POWER = 2**-0.5
LEAST_SQUARE = 1e-5  # of a stream's numbers, on average


@dataclass(frozen=True, slots=True)
class Streams:
    """The streams of a model; a stack of them is (tokens, count, hidden)."""

    spec: StreamSpec
    beginnings: list[Linear]  # of all but the first
    endings: list[Linear]
    layers: list[OwnStreams]

    def spread(self, residual: torch.Tensor) -> torch.Tensor:
        """The stack from embeddings (tokens, hidden)."""
        length = root_mean_square(residual)
        return torch.stack((residual, *(as_long(made(residual), length) for made in self.beginnings)), dim=1)

    def joined(self, stack: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) of the stack."""
        first, *others = (part.contiguous() for part in stack.unbind(1))
        length = root_mean_square(first)
        for part, made in zip(others, self.endings, strict=True):
            first = first + as_long(made(part), length)
        return first / self.spec.count

    def predicted(self, layer: int, stack: torch.Tensor, compute: Backend) -> torch.Tensor:
        """What the layer's result is expected to be, for all streams."""
        own, count = self.layers[layer], self.spec.count
        shares = self.shares(own, stack[:, self.spec.active].contiguous(), own.predictions, compute)
        shares = shares.view(-1, count, count).to(stack.dtype)
        if compute.deterministic:  # a product of a few numbers has an order of its own for each number of tokens
            return stack + (shares.unsqueeze(-1) * stack.unsqueeze(1)).sum(2)
        return torch.baddbmm(stack, shares, stack)

    def corrected(self, layer: int, predicted: torch.Tensor, result: torch.Tensor, compute: Backend) -> torch.Tensor:
        """The stack behind a layer, from what was predicted and the layer's result (tokens, hidden)."""
        own = self.layers[layer]
        shares = (self.shares(own, result, own.corrections, compute) + 1.0).to(result.dtype)
        missed = result - predicted[:, self.spec.active]
        return torch.addcmul(predicted, missed.unsqueeze(1), shares.unsqueeze(2))

    def shares(self, own: OwnStreams, x: torch.Tensor, weights: torch.Tensor, compute: Backend) -> torch.Tensor:
        """weights (n, count) times what a layer's router says of x (tokens, hidden): (tokens, n) float32."""
        said = torch.tanh(own.router(compute.normed(x, own.router_norm)).float() / x.shape[1])
        return (said.unsqueeze(1) * weights.float()).sum(-1)

    def beside(self, layer: DecoderLayer, residual: torch.Tensor, compute: Backend) -> torch.Tensor:
        """What stands beside the attention of a layer: (tokens, hidden)."""
        own, x = self.layers[layer.index], compute.normed(residual, layer.before_attention)
        return x + compute.normed(own.right(own.left(x)), own.norm)

    def add_input(self, stack: torch.Tensor, added: torch.Tensor) -> None:
        """Add a layer's own input (tokens, hidden) to all streams but the first."""
        stack[:, 1:] += added.unsqueeze(1)

    def read_by_input(self, layer: int, stack: torch.Tensor) -> torch.Tensor:
        """What that input is made of: (tokens, hidden)."""
        own, x = self.layers[layer], stack[:, self.spec.active].contiguous()
        return x if own.scale is None else x * own.scale


def add_halves(residual: torch.Tensor, beside: torch.Tensor) -> None:
    """residual = (residual + beside) / sqrt(2)."""
    residual.add_(beside).mul_(HALF_POWER)


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Of each row: (tokens, 1) float32."""
    return x.float().square().mean(-1, keepdim=True).sqrt()


def as_long(x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """x (tokens, hidden) with each row's root mean square as in `length` (tokens, 1)."""
    own = x.float().square().mean(-1, keepdim=True).clamp(min=LEAST_SQUARE).sqrt()
    return (x.float() * (length / own)).to(x.dtype)


def streams_of(spec: DecoderSpec, weights: Weights) -> Streams | None:
    """Those of a model, if it has several."""
    if (streams := spec.streams) is None:
        return None
    others = range(streams.count - 1)
    return Streams(
        spec=streams,
        beginnings=[linear(weights, "stream_in", other) for other in others],
        endings=[linear(weights, "stream_out", other) for other in others],
        layers=[own_streams(spec, streams, weights, layer) for layer in range(len(spec.layers))],
    )


def own_streams(spec: DecoderSpec, streams: StreamSpec, weights: Weights, layer: int) -> OwnStreams:
    """What layer number `layer` has for the streams."""
    return OwnStreams(
        active=streams.active,
        router=linear(weights, "stream_router", layer),
        router_norm=norm_of(spec, weights, "stream_router_norm", layer),
        predictions=weights.slab("stream_predictions", layer),
        corrections=weights.slab("stream_corrections", layer),
        scale=weights.slab("stream_scale", layer) if streams.scaled else None,
        left=linear(weights, "beside_left", layer),
        right=linear(weights, "beside_right", layer),
        norm=norm_of(spec, weights, "after_beside", layer),
    )


def add_streams(layout: Layout, spec: DecoderSpec, streams: StreamSpec) -> None:
    """Places for what makes the other streams of the first, and reads them at the end."""
    hidden, prefix = spec.hidden_size, spec.prefix
    for other in range(streams.count - 1):
        layout.add("stream_in", (other,), [(f"{prefix}altup_projections.{other}.weight", hidden)], hidden)
        layout.add("stream_out", (other,), [(f"{prefix}altup_unembed_projections.{other}.weight", hidden)], hidden)


def add_own_streams(layout: Layout, spec: DecoderSpec, streams: StreamSpec, layer: int, prefix: str) -> None:
    """Places for the tensors of one layer."""
    hidden, count, place = spec.hidden_size, streams.count, (layer,)
    altup, laurel = f"{prefix}altup.", f"{prefix}laurel."
    layout.add("stream_router", place, [(f"{altup}modality_router.weight", count)], hidden)
    layout.add("stream_router_norm", place, [(f"{altup}router_norm.weight", hidden)], None)
    layout.add("stream_predictions", place, [(f"{altup}prediction_coefs.weight", count * count)], count)
    layout.add("stream_corrections", place, [(f"{altup}correction_coefs.weight", count)], count)
    layout.add("stream_scale", place, [(f"{altup}correct_output_scale", hidden)], None)
    layout.add("beside_left", place, [(f"{laurel}linear_left.weight", streams.rank)], hidden)
    layout.add("beside_right", place, [(f"{laurel}linear_right.weight", hidden)], streams.rank)
    layout.add("after_beside", place, [(f"{laurel}post_laurel_norm.weight", hidden)], None)
