"""Logprobs of a message as rows that every API can print."""

from array import array
from collections.abc import Sequence
from typing import TypeVar

from quartet.runtime.messages import Logprobs, unpack_ids

Triple = tuple[float | None, int, str | None]  # (logprob, token id, token text where it was asked for)
Spelt = tuple[float | None, int, bytes]  # the same with the token's bytes, which may be part of a character
Row = TypeVar("Row", Triple, Spelt)


def floats(data: bytes) -> list[float | None]:
    """float32 values; None where there is none (NaN)."""
    values = array("f")
    values.frombytes(data)
    return [value if value == value else None for value in values]


def tokens(logprobs: Logprobs) -> list[Triple]:
    """One triple per position."""
    ids, values = unpack_ids(logprobs.ids), floats(logprobs.values)
    return list(zip(values, ids, as_texts(logprobs.texts, len(ids)), strict=True))


def top(logprobs: Logprobs, k: int) -> list[list[Triple] | None]:
    """The best k of each position, best first; None for a position that has none."""
    ids, values = unpack_ids(logprobs.top_ids), floats(logprobs.top_values)
    return in_rows(list(zip(values, ids, as_texts(logprobs.top_texts, len(ids)), strict=True)), k)


def asked(logprobs: Logprobs, ids: list[int]) -> list[list[Triple] | None]:
    """The asked ids of each position, in the asked order; None for a position that has none."""
    values = floats(logprobs.asked_values)
    texts = as_texts(logprobs.asked_texts, len(ids))
    repeats = len(values) // len(ids)
    return in_rows(list(zip(values, ids * repeats, texts * repeats, strict=True)), len(ids))


def spelt_tokens(logprobs: Logprobs) -> list[Spelt]:
    """One triple per position, for a request that asked for text."""
    return list(zip(floats(logprobs.values), unpack_ids(logprobs.ids), logprobs.texts or (), strict=True))


def spelt_top(logprobs: Logprobs, k: int) -> list[list[Spelt] | None]:
    """The best k of each position, best first; None for a position that has none."""
    values = floats(logprobs.top_values)
    return in_rows(list(zip(values, unpack_ids(logprobs.top_ids), logprobs.top_texts or (), strict=True)), k)


def supports(logprobs: Logprobs) -> list[list[int]]:
    """The ids that each token could have been."""
    ids, found, start = unpack_ids(logprobs.support_ids), [], 0
    for count in unpack_ids(logprobs.support_counts):
        found.append(ids[start : start + count].tolist())
        start += count
    return found


def as_texts(spelt: Sequence[bytes] | None, count: int) -> list[str | None]:
    """Tokens as text; None where no text was asked for. Part of a character is U+FFFD."""
    return [None] * count if not spelt else [token.decode(errors="replace") for token in spelt]


def in_rows(triples: list[Row], width: int) -> list[list[Row] | None]:
    rows = [triples[i : i + width] for i in range(0, len(triples), width)]
    return [None if row[0][0] is None else row for row in rows]
