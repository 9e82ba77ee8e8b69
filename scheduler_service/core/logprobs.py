"""Puts logprobs together: the prompt's from the chunks that were scored, the output's from several tokens."""

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
NULL = float("nan")  # sent to clients as null: the first position has no scored predecessor


def floats(value: float, count: int) -> bytes:
    return array("f", [value] * count).tobytes()


def take_prompt_logprobs(sequence: Sequence) -> Logprobs | None:
    """One entry for each prompt position from the requested start on, the first one null.

    None if not requested, not all scored yet, or sent already before the request was resumed. The sequence keeps no
    prompt logprobs afterwards.
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
    return concatenated(parts)


def concatenated(parts: list[Logprobs]) -> Logprobs:
    """The positions of all parts, in this order."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {name: b"".join([getattr(part, name) for part in parts]) for name in COLUMNS}
    return Logprobs(**columns)


def null_entry(token: int, top: int, asked: int) -> Logprobs:
    """The entry of a position without logprob, with `top` top and `asked` requested values."""
    return Logprobs(
        ids=pack_ids((token,)),
        values=floats(NULL, 1),
        top_ids=pack_ids([0] * top),
        top_values=floats(NULL, top),
        asked_values=floats(NULL, asked),
    )
