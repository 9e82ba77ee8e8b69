"""Attention of an encoder: each text over itself, with what some families add for how far apart two tokens are.

The texts of a step are put in order of length, so that those of one length are attended in one call.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F

from quartet.scheduler_service.model.encoder_spec import DistanceBias, DistanceVectors, EncoderSpec
from quartet.scheduler_service.model.layers import linear
from quartet.scheduler_service.weights.parameters import Weights

MOST_SCORES = 1 << 24  # of one call, where something is added to them: 64 MB in float32

Project = Callable[[torch.Tensor], torch.Tensor]
# queries and keys of texts (texts, heads, length, dim) → what is added to their scores (texts or 1, heads, length,
# length)
Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ScoresOfLayer = Callable[[Project], Scores]  # from a layer's product for queries, keys and values


@dataclass(frozen=True, slots=True)
class Group:
    """Texts of one length, side by side."""

    start: int  # first row
    texts: int
    length: int
    attended: int  # of a text's tokens: the first ones, which all of them see

    def parts(self, heads: int) -> "list[Group]":
        """The same texts, so many at once that their scores take bounded memory."""
        most = max(1, MOST_SCORES // (heads * self.length**2))
        return [
            replace(self, start=self.start + first * self.length, texts=min(most, self.texts - first))
            for first in range(0, self.texts, most)
        ]


def by_length(starts: torch.Tensor, attended: Sequence[int] | None = None) -> tuple[torch.Tensor, list[Group]]:
    """The order that puts texts of one length side by side, as rows of the batch, and the groups in that order."""
    bounds = starts.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    alike = list(zip(lengths, lengths if attended is None else attended, strict=True))
    texts = sorted(range(len(lengths)), key=alike.__getitem__)
    order = torch.cat([torch.arange(bounds[text], bounds[text + 1]) for text in texts])
    groups: list[Group] = []
    row = 0
    for (length, seen), same in groupby(texts, key=alike.__getitem__):
        groups.append(Group(row, len(list(same)), length, seen))
        row += groups[-1].texts * length
    return order, groups


class HeadByHead:
    """Queries, keys and values of one matrix that has them head by head, as DeBERTa v1; distances have their own."""

    def __init__(self, spec: EncoderSpec, weights: Weights, layer: int) -> None:
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.product = linear(weights, "qkv", layer)
        self.query_bias, self.value_bias = weights.slab("query_bias", layer), weights.slab("value_bias", layer)
        self.distance_query = linear(weights, "distance_query", layer, bias=True)
        self.distance_key = linear(weights, "distance_key", layer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, 3 * hidden) of x (tokens, hidden): all queries, then keys, then values."""
        queries, keys, values = self.product(x).view(len(x), self.heads, 3, self.head_dim).unbind(2)
        return torch.cat(
            (queries.flatten(1) + self.query_bias, keys.flatten(1), values.flatten(1) + self.value_bias), 1
        )

    def of_distances(self, table: torch.Tensor) -> torch.Tensor:
        """(distances, 2 * hidden) of their vectors: queries, then keys."""
        return torch.cat((self.distance_query(table), self.distance_key(table)), 1)


def near(window: int | None, length: int, device: torch.device) -> torch.Tensor | None:
    """Which keys each query sees, (length, length); None where it sees all."""
    if window is None or length <= window + 1:
        return None
    at = torch.arange(length, device=device)
    return (at.unsqueeze(1) - at).abs() <= window


def by_distance(values: torch.Tensor, length: int) -> torch.Tensor:
    """Values by key minus query (…, 2 * longest - 1), the middle one for 0 → (…, query, key), `length` of each."""
    longest = values.shape[-1] // 2 + 1
    return values.unfold(-1, length, 1)[..., longest - length : longest, :].flip(-2)


class AddedBias:
    """A number by head and distance, as MPNet has it."""

    def __init__(self, spec: DistanceBias, weights: Weights) -> None:
        self.spec = spec
        self.table = weights.slab("relative")  # (classes, heads)

    def prepare(self, longest: int) -> ScoresOfLayer:
        """For a step whose longest text has so many tokens."""
        distances = torch.arange(1 - longest, longest, device=self.table.device)  # key minus query
        values = F.embedding(distance_class(distances, self.spec), self.table).T  # (heads, 2 * longest - 1)
        return lambda _: lambda q, _: by_distance(values, q.shape[-2]).unsqueeze(0)


def distance_class(distances: torch.Tensor, spec: DistanceBias) -> torch.Tensor:
    """Of key minus query: near ones by themselves, farther ones by their logarithm, each direction on its own."""
    half = spec.classes // 2
    size = distances.abs()
    exact = half // 2
    far = torch.log(size.float() / exact) / math.log(spec.farthest / exact) * (half - exact)
    far = torch.where(size < exact, 0, far).long().add(exact).clamp(max=half - 1)
    return torch.where(distances > 0, half, 0) + torch.where(size < exact, size, far)


class AddedProducts:
    """Products of queries and keys with those of their distance, as DeBERTa has them."""

    def __init__(self, spec: EncoderSpec, weights: Weights) -> None:
        assert isinstance(spec.relative, DistanceVectors)
        self.spec = spec.relative
        self.heads, self.head_dim, self.epsilon = spec.heads, spec.head_dim, spec.norm_epsilon
        self.table = weights.slab("relative")  # (2 * span, hidden)
        self.norm = weights.slab("relative_norm") if self.spec.norm else None
        self.norm_bias = weights.slab("relative_norm_bias") if self.spec.norm else None
        self.scale = 1 / math.sqrt(self.head_dim * self.spec.terms)

    def prepare(self, longest: int) -> ScoresOfLayer:
        """For a step whose longest text has so many tokens: only the distances that occur are projected."""
        spec = self.spec
        distances = torch.arange(1 - longest, longest, device=self.table.device)  # key minus query
        classes = signed_class(-distances, spec)
        reach = min(spec.span, int(classes.max()) + 1)
        rows = (classes + spec.span).clamp(0, 2 * spec.span - 1) - (spec.span - reach)
        table = self.table[spec.span - reach : spec.span + reach]
        if self.norm is not None:
            table = F.layer_norm(table, self.norm.shape, self.norm, self.norm_bias, self.epsilon)
        return lambda project: self.of_layer(project(table), rows)

    def of_layer(self, projected: torch.Tensor, rows: torch.Tensor) -> Scores:
        """`projected` (distances, 2 or 3 * hidden), queries and keys first; `rows` (2 * longest - 1,): that of each key
        minus query."""
        parts = projected.view(len(projected), -1, self.heads, self.head_dim).permute(1, 2, 3, 0)
        queries, keys = parts[0], parts[1]  # each (heads, dim, distances)

        def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            index = by_distance(rows, q.shape[-2]).expand(*q.shape[:-1], -1)  # (texts, heads, query, key)
            found = torch.zeros(index.shape, dtype=q.dtype, device=q.device)
            if self.spec.keys:
                found += (q @ keys).gather(-1, index)
            if self.spec.queries:
                found += (k @ queries).gather(-1, index.transpose(-1, -2)).transpose(-1, -2)
            return found * self.scale

        return scores


def signed_class(distances: torch.Tensor, spec: DistanceVectors) -> torch.Tensor:
    """Of query minus key: within half of the span by themselves, farther ones by their logarithm."""
    if not spec.grows:
        return distances
    middle = spec.span // 2
    size = distances.abs().clamp(min=middle).float()
    far = torch.log(size / middle) / torch.log(torch.tensor((spec.farthest - 1) / middle)) * (middle - 1)
    return torch.where(distances.abs() <= middle, distances, (far.ceil() + middle).long() * distances.sign())
