"""Cuts a step short at the token that completed a stop."""

from quartet.runtime.messages import Tokens, unpack_ids

ID_BYTES = 4
FLOAT_BYTES = 4
ROWS = ("ids", "values", "top_ids", "top_values", "asked_values", "entropies", "support_counts", "support_values")


def first_rows(data: bytes, kept: int, rows: int) -> bytes:
    """The first `kept` of `rows` equal rows."""
    return data[: len(data) // rows * kept] if rows else data


def cut(tokens: Tokens, kept: int, made: int) -> None:
    """Keep the first `kept` of the `made` output tokens of a step, with all that belongs to them."""
    if kept == made:
        return
    tokens.ids = first_rows(tokens.ids, kept, made)
    if (logprobs := tokens.logprobs) is not None:
        for name in ROWS:
            setattr(logprobs, name, first_rows(getattr(logprobs, name), kept, made))
        logprobs.support_ids = logprobs.support_ids[: sum(unpack_ids(logprobs.support_counts)) * ID_BYTES]
    if tokens.drafts is not None:
        tokens.drafts.correct -= made - kept
    if tokens.hidden_states:  # rows of the prompt may come first
        tokens.hidden_states = tokens.hidden_states[: (kept - made) * tokens.hidden_size * FLOAT_BYTES]
