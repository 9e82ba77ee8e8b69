"""Logprobs on their way through: cut to the tokens that are kept, and given the tokens' texts where asked."""

from detokenizer_service.decode import Vocabulary
from runtime.messages import LogprobOptions, Logprobs, unpack_ids


def cut(logprobs: Logprobs, kept: int, positions: int) -> None:
    """Keep the first `kept` of `positions` rows."""
    for name in ("ids", "values", "top_ids", "top_values", "asked_values"):
        rows = getattr(logprobs, name)
        setattr(logprobs, name, rows[: len(rows) // positions * kept])


def fill_texts(logprobs: Logprobs, options: LogprobOptions, vocabulary: Vocabulary) -> None:
    """Write each token beside its id."""
    text = vocabulary.token_text
    logprobs.texts = [text(id) for id in unpack_ids(logprobs.ids)]
    if logprobs.top_ids:
        logprobs.top_texts = [text(id) for id in unpack_ids(logprobs.top_ids)]
    if options.token_ids is not None:
        logprobs.asked_texts = [text(id) for id in options.token_ids]
