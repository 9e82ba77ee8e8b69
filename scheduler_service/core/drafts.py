"""Drafts for speculative decoding: tokens that probably come next, because they followed the same tokens before, or
because a grammar leaves no other text.

A draft is verified by computing its tokens as if they were known: the token sampled after each position shows whether
the next one was right. Drafts change only how many tokens a step gives, so they may be cut or left out at any time.
"""

from array import array
from dataclasses import dataclass
from typing import Protocol

from quartet.runtime.messages import Request
from quartet.scheduler_service.core.ngrams import NGrams

FIRST_LENGTH = 2  # tokens of a request's first draft
MAX_SKIPPED = 16  # drafts left out between two tries, where drafts keep failing

Draft = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """What the flags say."""

    max_tokens: int  # of a draft
    min_match: int  # tokens that must have occurred before
    max_match: int  # tokens that are compared
    max_step_tokens: int = 64  # that the decode rows of a step compute, drafts included


class Guide(Protocol):
    """What a grammar says of a request's next tokens. It is a function of the grammar and the output so far."""

    def take(self, tokens: "array[int]") -> None:
        """Tokens that the output has grown by."""
        ...

    def allowed(self, draft: Draft) -> int:
        """How many tokens of a draft, from its first one on, the grammar allows next."""
        ...

    def forced(self) -> Draft:
        """The tokens of the only text that the grammar allows next; often none."""
        ...


class Grammar(Protocol):
    """What constrains the output of a request, as far as its drafts are concerned."""

    def guide(self) -> Guide:
        """A guide at the beginning of the output."""
        ...


class DraftLength:
    """How long the drafts of one source are: they grow while they are right, and shrink and become rare while not."""

    __slots__ = ("_most", "_skip_after_failure", "_to_skip", "tokens")

    def __init__(self, first: int, most: int) -> None:
        self.tokens = min(first, most)  # of the next draft, at most
        self._most = most
        self._to_skip = 0  # drafts still to be left out
        self._skip_after_failure = 1

    def skips(self) -> bool:
        """Whether the draft that was found is left out."""
        if not self._to_skip:
            return False
        self._to_skip -= 1
        return True

    def learn(self, proposed: int, correct: int) -> None:
        """A draft of `proposed` tokens was verified; its first `correct` ones were right."""
        if correct == proposed:
            self.tokens = min(self._most, max(self.tokens, 2 * proposed))
        else:
            self.tokens = max(1, correct, self.tokens // 2)
        if correct:
            self._skip_after_failure = 1
        elif proposed == 1:
            self._to_skip = self._skip_after_failure
            self._skip_after_failure = min(2 * self._skip_after_failure, MAX_SKIPPED)


class Drafter:
    """Drafts for one request: what followed its last tokens before, or what its grammar forces, if that is longer."""

    __slots__ = ("_forced_length", "_grammar", "_guide", "_ngrams", "_repeated_length", "_source", "_taken")

    def __init__(self, options: DraftOptions, grammar: Grammar | None = None, prompt_len: int = 0) -> None:
        self._ngrams = NGrams(options.min_match, options.max_match)
        self._grammar = grammar
        self._guide: Guide | None = None  # made for the first draft: a request that waits needs none
        self._taken = prompt_len  # tokens of the sequence that the guide knows, or that are none of its business
        self._repeated_length = DraftLength(FIRST_LENGTH, options.max_tokens)
        self._forced_length = DraftLength(options.max_tokens, options.max_tokens)
        self._source = self._repeated_length  # of the draft that was proposed last

    def propose(self, ids: "array[int]", max_tokens: int) -> Draft:
        """What may follow `ids`: at most `max_tokens` tokens, often none."""
        repeated = self._repeated(ids, max_tokens)
        if self._grammar is None:
            return repeated
        if self._guide is None:
            self._guide = self._grammar.guide()
        self._guide.take(ids[self._taken :])
        self._taken = len(ids)
        repeated = repeated[: self._guide.allowed(repeated)] if repeated else ()
        forced = self._guide.forced()[: min(self._forced_length.tokens, max_tokens)]
        if len(forced) > len(repeated) and not self._forced_length.skips():
            self._source = self._forced_length
            return forced
        self._source = self._repeated_length
        return repeated

    def _repeated(self, ids: "array[int]", max_tokens: int) -> Draft:
        """What followed the last tokens before."""
        if not self._ngrams.follow(ids):
            return ()
        draft = self._ngrams.continuation(ids, min(self._repeated_length.tokens, max_tokens))
        return () if draft and self._repeated_length.skips() else draft

    def learn(self, proposed: int, correct: int) -> None:
        """The draft proposed last was verified, or its first `proposed` tokens; the first `correct` were right."""
        self._source.learn(proposed, correct)


def drafter_of(
    request: Request, options: DraftOptions | None, grammar: Grammar | None = None, prompt_len: int = 0
) -> Drafter | None:
    """A drafter, if several tokens of the request can be verified at once; else None.

    Penalties depend on each token before the next one is sampled; hidden states and experts are returned once for
    every position.
    """
    params = request.params
    looks_back = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    returned_by_position = request.return_hidden_states or request.return_routed_experts
    if options is None or request.task != "generate" or looks_back or returned_by_position:
        return None
    return Drafter(options, grammar, prompt_len)
