"""Adjustments of the logits of single tokens: penalties, the minimum length, bias, the end of a thought.

The same on any device.

A parameter that adjusts single tokens is a field of `SamplingParams` and a row of `ADJUSTMENTS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch

from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.host.transfer import send, upload
from quartet.scheduler_service.sampling.rows import Feature, Row

CERTAIN = 1e30  # a logit beside which no other counts; finite, whatever the temperature

AdjustedRow = tuple[int, Row, int]  # row of the logits, its request, the position of the token that is drawn


@dataclass(frozen=True)
class Adjustment:
    """What some parameters do to logits (rows, vocab) float32, in place."""

    is_used: Callable[[SamplingParams], bool]
    apply: Callable[[torch.Tensor, list[AdjustedRow]], None]  # to the rows that use it
    counts_output: bool = False  # needs the counts of all output tokens


def adjust_single_tokens(logits: torch.Tensor, rows: list[Row], positions: list[int]) -> None:
    """Apply the adjustments that each row's request uses, in the order of the table."""
    adjusted = [
        (index, row, position)
        for index, (row, position) in enumerate(zip(rows, positions, strict=True))
        if row.settings.features & Feature.ADJUST
    ]
    for adjustment in ADJUSTMENTS if adjusted else ():
        if using := [entry for entry in adjusted if adjustment.is_used(entry[1].params)]:
            adjustment.apply(logits, using)


def has_penalty(params: SamplingParams) -> bool:
    return bool(params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0)


def penalise(logits: torch.Tensor, rows: list[AdjustedRow]) -> None:
    """Frequency and presence are subtracted, repetition scales, for tokens of the output."""
    vocab = logits.shape[1]
    where, counts, factors = [], [], []
    for index, row, _ in rows:
        if row.counted:
            params = row.params
            where.append(torch.tensor(row.counted) + index * vocab)
            counts.append(torch.tensor(row.counts))
            factors.append((params.frequency_penalty, params.presence_penalty, params.repetition_penalty))
    if not where:
        return
    device = logits.device
    flat = send(torch.cat(where), device)
    lengths = torch.tensor([len(part) for part in where])
    frequency, presence, repetition = send(torch.tensor(factors).repeat_interleave(lengths, 0), device).unbind(1)
    values = logits.view(-1)[flat] - frequency * send(torch.cat(counts), device) - presence
    logits.view(-1)[flat] = torch.where(values > 0, values / repetition, values * repetition)


def forbid_the_end(logits: torch.Tensor, rows: list[AdjustedRow]) -> None:
    """Mask the ids that end a request which has not made its minimum of tokens."""
    for index, row, position in rows:
        if row.end_ids and position - row.prompt_len < row.params.min_new_tokens:
            logits[index, upload(row.end_ids, logits.device)] = -inf


def add_bias(logits: torch.Tensor, rows: list[AdjustedRow]) -> None:
    for index, row, _ in rows:
        logits[index, upload(row.bias_ids, logits.device)] += upload(row.biases, logits.device)


def end_thought(logits: torch.Tensor, rows: list[AdjustedRow]) -> None:
    """Leave only the closing tag where the budget of a thought is spent.

    A grammar does not allow it amid a character: then it comes behind the character, so others must stay possible.
    """
    for index, row, position in rows:
        if row.thought_budget is not None and (token := row.thought_budget.forced_at(position)) is not None:
            if row.params.grammar is None:
                logits[index] = -inf
            logits[index, token] = CERTAIN


ADJUSTMENTS = (
    Adjustment(has_penalty, penalise, counts_output=True),
    Adjustment(lambda params: params.min_new_tokens > 0, forbid_the_end),
    Adjustment(lambda params: bool(params.logit_bias), add_bias),
    Adjustment(lambda params: params.thinking_budget is not None, end_thought),
)
