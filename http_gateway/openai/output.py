"""What one request of an OpenAI call has produced so far: its counts, and what the client has not been sent yet."""

import codecs
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

from msgspec import UNSET

from quartet.http_gateway.generation import logprobs
from quartet.http_gateway.generation.logprobs import Spelt
from quartet.http_gateway.openai.answers import (
    CachedTokens,
    ChatLogprobs,
    CompletionLogprobs,
    ReasoningTokens,
    ScoredPosition,
    ScoredToken,
    Usage,
)
from quartet.runtime.messages import Finish, LogprobOptions, Logprobs, Text

ID_BYTES = 4


class Scored(NamedTuple):
    """One position: its token, and the best ones where they were asked for."""

    token: Spelt
    top: list[Spelt] | None
    prompt: bool = False  # a position of the prompt
    spoken: bool = True  # the token is part of the output's text


class Offsets:
    """Where in the text each token begins, in characters; a text is the echoed prompt and the output behind it.

    A token of the prompt that is not found in its text was put there by the tokenizer and takes no room.
    """

    def __init__(self, prompt: str = "") -> None:
        self._prompt = prompt.encode()
        self._found = 0  # bytes of the prompt
        self._at = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, position: Scored) -> int:
        """The place of the next token."""
        start = self._at
        _, _, token = position.token
        if position.prompt:
            token = self._in_prompt(token)
        if position.spoken:
            self._at += len(self._utf8.decode(token))
        return start

    def _in_prompt(self, token: bytes) -> bytes:
        """What the prompt's text has of a token, and what it leaves to the output: the start of a character."""
        if not self._found and token.startswith(b" ") and not self._prompt.startswith(b" "):
            token = token[1:]  # the space that some tokenizers put before a text
        if self._prompt.startswith(token, self._found):
            self._found += len(token)
            return token
        return token if self._found == len(self._prompt) and not is_text(token) else b""


class OutputState:
    """The output of one request so far."""

    def __init__(self, options: LogprobOptions | None) -> None:
        """`options`: of the logprobs that are sent."""
        self.finish: Finish | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.weight_version = ""
        self._options = options
        self._scored: list[Scored] = []
        self._sent_tokens = 0  # completion tokens at the last `scored`

    def take(self, text: Text) -> None:
        """Note one step of the request, all but its text."""
        tokens = text.tokens
        self.completion_tokens += len(tokens.ids) // ID_BYTES
        self.prompt_tokens = tokens.prompt_tokens or self.prompt_tokens
        self.cached_tokens = max(self.cached_tokens, tokens.cached_tokens)
        self.weight_version = tokens.weight_version or self.weight_version
        self.finish = tokens.finish
        for part in (tokens.input_logprobs, tokens.logprobs):
            if part is not None and self._options is not None:
                self._scored += self._positions(part, part is tokens.input_logprobs)

    def _positions(self, part: Logprobs, prompt: bool) -> Iterable[Scored]:
        assert self._options is not None
        own = logprobs.spelt_tokens(part)
        best = logprobs.spelt_top(part, self._options.top) if self._options.top else [None] * len(own)
        spoken = [True] * len(own)
        for place in part.unspoken:
            spoken[place] = False
        return map(Scored, own, best, repeat(prompt), spoken)

    def due(self, interval: int) -> bool:
        """Whether the next chunk is due: with the first token, then with every `interval`th, and at the end."""
        return self.finish is not None or -(-self.completion_tokens // interval) > -(-self._sent_tokens // interval)

    def scored(self) -> list[Scored]:
        """The positions that were not sent yet."""
        self._sent_tokens = self.completion_tokens
        scored, self._scored = self._scored, []
        return scored

    @property
    def finish_reason(self) -> str | None:
        return None if self.finish is None else self.finish.reason

    @property
    def matched_stop(self) -> int | str | None:
        return None if self.finish is None else self.finish.matched


def usage(states: Sequence[OutputState], copies: int, *, cache_report: bool) -> Usage:
    """What all requests took: every prompt once, though `copies` requests share it."""
    firsts = states[::copies]
    prompt = sum(state.prompt_tokens for state in firsts)
    completion = sum(state.completion_tokens for state in states)
    reasoning = sum(state.reasoning_tokens for state in states)
    return Usage(
        prompt_tokens=prompt,
        total_tokens=prompt + completion,
        completion_tokens=completion,
        prompt_tokens_details=CachedTokens(sum(d.cached_tokens for d in firsts)) if cache_report else None,
        reasoning_tokens=reasoning,
        completion_tokens_details=ReasoningTokens(reasoning) if reasoning else UNSET,
    )


def completion_logprobs(scored: Sequence[Scored], offsets: Offsets) -> CompletionLogprobs:
    """As /v1/completions prints them."""
    return CompletionLogprobs(
        text_offset=[offsets.next(position) for position in scored],
        token_logprobs=[position.token[0] for position in scored],
        tokens=[named(position.token[2]) for position in scored],
        top_logprobs=[by_text(position) for position in scored],
    )


def by_text(position: Scored) -> dict[str, float | None] | None:
    """The best tokens by their text. Where another has that text, the position's own token first, it is its id."""
    if position.top is None:
        return None
    texts = {named(position.token[2]): position.token[1]}
    found: dict[str, float | None] = {}
    for value, id, token in position.top:
        text = named(token)
        found[text if texts.setdefault(text, id) == id else f"token_id:{id}"] = value
    return found


def named(token: bytes) -> str:
    """A token as text; one that is part of a character by its bytes, as OpenAI writes them."""
    return token.decode() if is_text(token) else "bytes:" + escaped(token)


def is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def escaped(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)


def chat_logprobs(scored: Sequence[Scored]) -> ChatLogprobs:
    """As /v1/chat/completions prints them."""
    return ChatLogprobs([position_of(position.token, position.top or []) for position in scored])


def position_of(token: Spelt, top: list[Spelt]) -> ScoredPosition:
    own = token_of(token)
    return ScoredPosition(token=own.token, bytes=own.bytes, logprob=own.logprob, top_logprobs=list(map(token_of, top)))


def token_of(spelt: Spelt) -> ScoredToken:
    value, _, token = spelt
    return ScoredToken(token=token.decode() if is_text(token) else escaped(token), bytes=list(token), logprob=value)
