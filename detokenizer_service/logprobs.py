"""Adds the text of tokens to their ids, for requests that ask for text in logprobs."""

from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.stream import Stream
from quartet.runtime.messages import LogprobOptions, Logprobs, Tokens, unpack_ids


def add_texts(tokens: Tokens, stream: Stream, vocabulary: Vocabulary) -> None:
    """Fill the text fields of all logprobs of a step that the stream has just read."""
    options = stream.request.logprobs
    if options is None or not options.text:
        return
    for logprobs in (tokens.logprobs, tokens.input_logprobs):
        if logprobs is not None:
            _fill(logprobs, options, vocabulary)
    if tokens.logprobs is not None:
        tokens.logprobs.unspoken = _unspoken(tokens.logprobs, stream, vocabulary)


def _fill(logprobs: Logprobs, options: LogprobOptions, vocabulary: Vocabulary) -> None:
    text = vocabulary.token_bytes
    logprobs.texts = [text(id) for id in unpack_ids(logprobs.ids)]
    if logprobs.top_ids:
        logprobs.top_texts = [text(id) for id in unpack_ids(logprobs.top_ids)]
    if options.token_ids is not None:
        logprobs.asked_texts = [text(id) for id in options.token_ids]


def _unspoken(logprobs: Logprobs, stream: Stream, vocabulary: Vocabulary) -> list[int]:
    """The special tokens that are skipped, and the stop token that is cut off."""
    ids = unpack_ids(logprobs.ids)
    skips = stream.request.params.skip_special_tokens
    last = len(ids) - 1 if stream.trimmed else -1
    return [place for place, id in enumerate(ids) if place == last or (skips and vocabulary.is_special(id))]
