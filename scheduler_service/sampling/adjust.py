"""What concerns a few tokens of some rows of logits: penalties, the minimum length and bias. The same on any device."""

from functools import reduce
from math import inf
from operator import or_

import torch

from quartet.scheduler_service.host.transfer import send, upload
from quartet.scheduler_service.sampling.rows import Feature
from quartet.scheduler_service.sampling.state import Row


def adjust_single_tokens(logits: torch.Tensor, rows: list[Row], positions: list[int]) -> None:
    """What concerns a few tokens of some rows: penalties, the minimum length and bias."""
    features = reduce(or_, (row.features for row in rows), 0)
    if features & Feature.PENALTY:
        penalise(logits, rows)
    if features & Feature.MIN_LENGTH:
        forbid_the_end(logits, rows, positions)
    if features & Feature.BIAS:
        add_bias(logits, rows)


def penalise(logits: torch.Tensor, rows: list[Row]) -> None:
    """Frequency and presence are subtracted, repetition scales, for tokens of the output."""
    vocab = logits.shape[1]
    where, counts, factors = [], [], []
    for i, row in enumerate(rows):
        if row.features & Feature.PENALTY and row.counted:
            params = row.params
            where.append(torch.tensor(row.counted) + i * vocab)
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


def forbid_the_end(logits: torch.Tensor, rows: list[Row], positions: list[int]) -> None:
    """Mask the ids that end a request which has not made its minimum of tokens."""
    for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
        if row.end_ids and position - row.prompt_len < row.params.min_new_tokens:
            logits[i, upload(row.end_ids, logits.device)] = -inf


def add_bias(logits: torch.Tensor, rows: list[Row]) -> None:
    for i, row in enumerate(rows):
        if row.bias_ids:
            logits[i, upload(row.bias_ids, logits.device)] += upload(row.biases, logits.device)
