"""How the rows of a step's logits are drawn from, and what was drawn: the arguments and the result of sampling."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.thought_budget import ThoughtBudget


class Feature:
    """What a request asks of the sampler beyond a greedy choice; plain ints, for enums are slow to combine."""

    DRAW = 1
    TOP_K = 2
    TOP_P = 4
    MIN_P = 8
    ADJUST = 16  # logits of single tokens: see adjust.py


class DrawSettings(NamedTuple):
    """What one request's draws depend on besides logits and position; neutral values where a feature is not used."""

    features: int  # Feature values, or-ed
    temperature: float  # 0: the largest logit
    top_k: int  # 0: all
    top_p: float  # 1: all
    min_p: float  # 0: all
    seed: int  # int64

    @property
    def plain(self) -> bool:
        """Whether only a temperature is used, or the largest logit is taken."""
        return not self.features & ~Feature.DRAW


@dataclass(slots=True)
class SamplingRows:
    """The settings of a step's rows, one list for each of them: see DrawSettings."""

    features: list[int]
    temperatures: list[float]
    top_ks: list[int]
    top_ps: list[float]
    min_ps: list[float]
    seeds: list[int]
    positions: list[int]  # where the tokens are to stand that are drawn

    def __len__(self) -> int:
        return len(self.positions)

    def drawing(self) -> list[int]:
        """The rows that take another token than the one with the largest logit."""
        return [row for row, temperature in enumerate(self.temperatures) if temperature]

    def using(self, feature: int, rows: Iterable[int]) -> list[int]:
        """Which of `rows` use a feature: their places in `rows`."""
        return [place for place, row in enumerate(rows) if self.features[row] & feature]


@dataclass(slots=True)
class Row:
    """The sampler's state of one admitted request."""

    params: SamplingParams
    settings: DrawSettings
    prompt_len: int
    end_ids: list[int]  # ids that would end the request
    bias_ids: "array[int]"
    biases: "array[float]"
    counts_output: bool  # whether the output tokens are counted
    counted: "array[int]" = field(default_factory=lambda: array("q"))  # distinct output tokens
    counts: "array[int]" = field(default_factory=lambda: array("q"))  # how often each occurred
    places: dict[int, int] = field(default_factory=dict)  # token → index into the two arrays
    thought_budget: ThoughtBudget | None = None

    def add(self, token: int) -> None:
        """Note an output token."""
        if self.counts_output:
            self.count((token,))
        if self.thought_budget is not None:
            self.thought_budget.take(token)

    def needs_output(self, unseen: int) -> bool:
        """Whether the next draw depends on all earlier tokens, the last `unseen` of which were not noted yet."""
        return self.counts_output or (self.thought_budget is not None and self.thought_budget.free <= unseen)

    def count(self, tokens: Iterable[int]) -> None:
        """Note how often output tokens occurred."""
        for token in tokens:
            place = self.places.setdefault(token, len(self.counted))
            if place == len(self.counted):
                self.counted.append(token)
                self.counts.append(0)
            self.counts[place] += 1


def sampling_rows(settings: Iterable[DrawSettings], positions: list[int]) -> SamplingRows:
    """By row: the settings of its request, and the position of the token that is drawn. At least one row."""
    features, temperatures, top_ks, top_ps, min_ps, seeds = map(list, zip(*settings, strict=True))
    return SamplingRows(features, temperatures, top_ks, top_ps, min_ps, seeds, positions)


@dataclass(slots=True)
class Draws:
    """What one call chose, on the device of the logits."""

    tokens: torch.Tensor  # (rows,) int64
    valid: torch.Tensor  # (rows,) bool; False: the row had no finite largest logit
