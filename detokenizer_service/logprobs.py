"""Writes tokens beside their ids, for requests that ask for text in logprobs."""

from detokenizer_service.decode import Vocabulary
from runtime.messages import LogprobOptions, Logprobs, Tokens, unpack_ids


def add_texts(tokens: Tokens, options: LogprobOptions | None, vocabulary: Vocabulary) -> None:
    """Fill the text fields of all logprobs of a step."""
    if options is None or not options.text:
        return
    for logprobs in (tokens.logprobs, tokens.input_logprobs):
        if logprobs is not None:
            _fill(logprobs, options, vocabulary)


def _fill(logprobs: Logprobs, options: LogprobOptions, vocabulary: Vocabulary) -> None:
    text = vocabulary.token_text
    logprobs.texts = [text(id) for id in unpack_ids(logprobs.ids)]
    if logprobs.top_ids:
        logprobs.top_texts = [text(id) for id in unpack_ids(logprobs.top_ids)]
    if options.token_ids is not None:
        logprobs.asked_texts = [text(id) for id in options.token_ids]
