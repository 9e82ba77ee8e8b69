"""Logprobs put together: the prompt's from the chunks that scored them, those of several output tokens."""

from array import array
from typing import Any

from quartet.runtime.messages import Logprobs, pack_ids
from quartet.scheduler_service.core.request import Sequence

COLUMNS = (
    "ids",
    "values",
    "top_ids",
    "top_values",
    "asked_values",
    "entropies",
    "support_counts",
    "support_ids",
    "support_values",
)
NONE = float("nan")  # stands for null: the start position has no scored predecessor


def floats(value: float, count: int) -> bytes:
    return array("f", [value] * count).tobytes()


def joined(sequence: Sequence) -> Logprobs | None:
    """One entry for each prompt position from the start that was asked, the first one null.

    None if not asked, not all scored yet, or sent in an earlier life. What was scored is kept no longer.
    """
    options = sequence.request.logprobs
    if options is None or options.start < 0 or sequence.request.resume_ids:
        return None
    if options.start >= sequence.prompt_len:
        return Logprobs(ids=b"", values=b"")
    if max(options.start, sequence.input_scored) < sequence.prompt_len - 1:
        return None
    parts = [null_entry(sequence.ids[options.start], options.top, len(options.token_ids or ())), *sequence.scored]
    sequence.scored = []
    return in_a_row(parts)


def in_a_row(parts: list[Logprobs]) -> Logprobs:
    """Runs of positions, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {name: b"".join([getattr(part, name) for part in parts]) for name in COLUMNS}
    return Logprobs(**columns)


def null_entry(token: int, top: int, asked: int) -> Logprobs:
    return Logprobs(
        ids=pack_ids((token,)),
        values=floats(NONE, 1),
        top_ids=pack_ids([0] * top),
        top_values=floats(NONE, top),
        asked_values=floats(NONE, asked),
    )
