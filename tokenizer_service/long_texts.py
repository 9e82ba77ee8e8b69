"""Encodes long texts in the background, one at a time, in a thread: the tokenizer releases Python's lock.

A text is counted in pieces before it is encoded whole, so a prompt that is far too long costs no more than the longest
that fits, and the work on a text that was cancelled ends after a piece.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any

from quartet.runtime.errors import RequestError
from quartet.tokenizer_service.prompts import Prompt

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

PIECE_CHARS = 1 << 16
MARGIN = 2  # so many times the limit in the sum of the pieces, cut anywhere, is more than the limit in the whole


@dataclass(eq=False)
class LongText:
    """A text and how many tokens it may have; `cancelled` ends the work at the next piece."""

    prompt: Prompt
    max_tokens: int | None
    cancelled: Event


class LongTexts:
    """The thread and what it does at present."""

    def __init__(self, tokenizer: "Tokenizer", executor: Executor | None = None) -> None:
        self._tokenizer = tokenizer
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="long-texts")

    def start(self, text: LongText) -> "Future[Encoding | RequestError | None]":
        """Begin. The result is None for a cancelled text, TooManyTokens for one that has too many."""
        return self._executor.submit(encode, self._tokenizer, text)


class TooManyTokens(RequestError):
    """More tokens than a text may have. Its message is the caller's."""


def encode(tokenizer: "Tokenizer", text: LongText) -> "Encoding | RequestError | None":
    """Encode one text, in the thread."""
    prompt = text.prompt
    try:
        if text.max_tokens is not None and has_more_tokens(tokenizer, text, MARGIN * text.max_tokens):
            return TooManyTokens("the text has too many tokens", field="text")
        return None if text.cancelled.is_set() else encode_whole(tokenizer, [prompt.text], prompt.special_tokens)[0]
    except Exception as error:  # tokenizers raises nothing narrower
        return cannot_be_tokenized(error)


def has_more_tokens(tokenizer: "Tokenizer", text: LongText, limit: int) -> bool:
    """Whether the pieces of a text have more tokens together; looks no further than it has to."""
    counted = 0
    for piece in pieces(text.prompt):
        if text.cancelled.is_set():
            return False
        counted += len(encode_whole(tokenizer, [piece], special=False)[0])
        if counted > limit:
            return True
    return False


def encode_whole(tokenizer: "Tokenizer", texts: list[Any], special: bool) -> "list[Encoding]":
    """Encode each text, with the special tokens of the model or without. Raises what the tokenizer raises."""
    return tokenizer.encode_batch_fast(texts, add_special_tokens=special)


def cannot_be_tokenized(error: Exception) -> RequestError:
    return RequestError(f"the text cannot be tokenized: {error}", field="text")


def pieces(prompt: Prompt) -> Iterator[str]:
    """The text, or both texts of a pair, cut every so many characters."""
    for text in [prompt.text] if isinstance(prompt.text, str) else prompt.text:
        for start in range(0, len(text), PIECE_CHARS):
            yield text[start : start + PIECE_CHARS]
