"""Logprobs of a message as rows that every API can print."""

from array import array
from collections.abc import Sequence

from runtime.messages import Logprobs, unpack_ids

Triple = tuple[float | None, int, str | None]  # (logprob, token id, token text where it was asked for)


def floats(data: bytes) -> list[float | None]:
    """float32 values; None where there is none (NaN)."""
    values = array("f")
    values.frombytes(data)
    return [value if value == value else None for value in values]


def tokens(logprobs: Logprobs) -> list[Triple]:
    """One triple per position."""
    ids, values = unpack_ids(logprobs.ids), floats(logprobs.values)
    texts: Sequence[str | None] = logprobs.texts or [None] * len(ids)
    return list(zip(values, ids, texts, strict=True))


def top(logprobs: Logprobs, k: int) -> list[list[Triple] | None]:
    """The best k of each position, best first; None for a position that has none."""
    ids, values = unpack_ids(logprobs.top_ids), floats(logprobs.top_values)
    texts: Sequence[str | None] = logprobs.top_texts or [None] * len(ids)
    return in_rows(list(zip(values, ids, texts, strict=True)), k)


def asked(logprobs: Logprobs, ids: list[int]) -> list[list[Triple] | None]:
    """The asked ids of each position, in the asked order; None for a position that has none."""
    values = floats(logprobs.asked_values)
    texts: list[str | None] = [*logprobs.asked_texts] if logprobs.asked_texts else [None] * len(ids)
    repeats = len(values) // len(ids)
    return in_rows(list(zip(values, ids * repeats, texts * repeats, strict=True)), len(ids))


def in_rows(triples: list[Triple], width: int) -> list[list[Triple] | None]:
    rows = [triples[i : i + width] for i in range(0, len(triples), width)]
    return [None if row[0][0] is None else row for row in rows]
