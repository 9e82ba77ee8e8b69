"""What one request of an OpenAI call has produced so far: its counts, and what the client has not been told yet."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from http_gateway import logprobs
from http_gateway.logprobs import Triple
from http_gateway.openai_answers import (
    CachedTokens,
    ChatLogprobs,
    CompletionLogprobs,
    ScoredPosition,
    ScoredToken,
    Usage,
)
from runtime.messages import Finish, LogprobOptions, Logprobs, Text

ID_BYTES = 4
NOT_COMPUTED = -1


class Scored(NamedTuple):
    """One position: its token, and the best ones where they were asked for."""

    token: Triple
    top: list[Triple] | None


class Draft:
    """The output of one request on its way."""

    def __init__(self, options: LogprobOptions | None) -> None:
        self.finish: Finish | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.weight_version = ""
        self._options = options
        self._scored: list[Scored] = []
        self._told = 0  # completion tokens at the last `scored`

    def take(self, text: Text) -> None:
        """Note one step of the request, all but its text."""
        tokens = text.tokens
        self.completion_tokens += len(tokens.ids) // ID_BYTES
        self.prompt_tokens = tokens.prompt_tokens or self.prompt_tokens
        self.cached_tokens = max(self.cached_tokens, tokens.cached_tokens)
        self.weight_version = tokens.weight_version or self.weight_version
        self.finish = tokens.finish
        for part in (tokens.input_logprobs, tokens.logprobs):
            if part is not None:
                self._scored += self._positions(part)

    def _positions(self, part: Logprobs) -> Iterable[Scored]:
        assert self._options is not None
        own = logprobs.tokens(part)
        best = logprobs.top(part, self._options.top) if self._options.top else [None] * len(own)
        return map(Scored, own, best)

    def due(self, interval: int) -> bool:
        """Is it time for the next chunk? The first token, then every `interval`th, and the end are told."""
        return self.finish is not None or -(-self.completion_tokens // interval) > -(-self._told // interval)

    def scored(self) -> list[Scored]:
        """The positions that were not told yet."""
        self._told = self.completion_tokens
        scored, self._scored = self._scored, []
        return scored

    @property
    def finish_reason(self) -> str | None:
        return None if self.finish is None else self.finish.reason

    @property
    def matched_stop(self) -> int | str | None:
        return None if self.finish is None else self.finish.matched


def usage(drafts: Sequence[Draft], copies: int, *, cache_report: bool) -> Usage:
    """What all requests took: every prompt once, though `copies` requests share it."""
    firsts = drafts[::copies]
    prompt = sum(draft.prompt_tokens for draft in firsts)
    completion = sum(draft.completion_tokens for draft in drafts)
    return Usage(
        prompt_tokens=prompt,
        total_tokens=prompt + completion,
        completion_tokens=completion,
        prompt_tokens_details=CachedTokens(sum(d.cached_tokens for d in firsts)) if cache_report else None,
        reasoning_tokens=sum(draft.reasoning_tokens for draft in drafts),
    )


def completion_logprobs(scored: Sequence[Scored]) -> CompletionLogprobs:
    """As /v1/completions prints them."""
    return CompletionLogprobs(
        text_offset=[NOT_COMPUTED] * len(scored),
        token_logprobs=[position.token[0] for position in scored],
        tokens=[position.token[2] for position in scored],
        top_logprobs=[by_text(position.top) for position in scored],
    )


def by_text(triples: list[Triple] | None) -> dict[str, float | None] | None:
    return None if triples is None else {text or "": value for value, _, text in triples}


def chat_logprobs(scored: Sequence[Scored]) -> ChatLogprobs:
    """As /v1/chat/completions prints them."""
    return ChatLogprobs([position_of(token, top or []) for token, top in scored])


def position_of(token: Triple, top: list[Triple]) -> ScoredPosition:
    own = token_of(token)
    return ScoredPosition(token=own.token, bytes=own.bytes, logprob=own.logprob, top_logprobs=list(map(token_of, top)))


def token_of(triple: Triple) -> ScoredToken:
    value, _, text = triple
    return ScoredToken(token=text or "", bytes=list((text or "").encode()), logprob=value)
