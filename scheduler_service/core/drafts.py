"""Drafts for speculative decoding: tokens that probably come next, because they followed the same tokens before.

A draft is verified by computing its tokens as if they were known: the token sampled after each position shows whether
the next one was right. Drafts change only how many tokens a step gives, so they may be cut or left out at any time.
"""

from array import array
from dataclasses import dataclass

from quartet.runtime.messages import Request
from quartet.scheduler_service.core.ngrams import NGrams

FIRST_LENGTH = 2  # tokens of a request's first draft
MAX_SKIPPED = 16  # drafts left out between two tries, where drafts keep failing


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """What the flags say."""

    max_tokens: int  # of a draft
    min_match: int  # tokens that must have occurred before
    max_match: int  # tokens that are compared
    max_step_tokens: int = 64  # that the decode rows of a step compute, drafts included


class Drafter:
    """Drafts for one request: longer while they are right, shorter and then rare while they are wrong."""

    __slots__ = ("_max_tokens", "_ngrams", "_skip_after_failure", "_to_skip", "length")

    def __init__(self, options: DraftOptions) -> None:
        self.length = min(FIRST_LENGTH, options.max_tokens)  # of the next draft, at most
        self._max_tokens = options.max_tokens
        self._ngrams = NGrams(options.min_match, options.max_match)
        self._to_skip = 0  # drafts still to be left out
        self._skip_after_failure = 1

    def propose(self, ids: "array[int]", max_tokens: int) -> tuple[int, ...]:
        """What may follow `ids`: at most `max_tokens` tokens, often none."""
        if not self._ngrams.follow(ids):
            return ()
        draft = self._ngrams.continuation(ids, min(self.length, max_tokens))
        if draft and self._to_skip:
            self._to_skip -= 1
            return ()
        return draft

    def learn(self, proposed: int, correct: int) -> None:
        """A draft of `proposed` tokens was verified; its first `correct` ones were right."""
        if correct == proposed:
            self.length = min(self._max_tokens, max(self.length, 2 * proposed))
        else:
            self.length = max(1, correct, self.length // 2)
        if correct:
            self._skip_after_failure = 1
        elif proposed == 1:
            self._to_skip = self._skip_after_failure
            self._skip_after_failure = min(2 * self._skip_after_failure, MAX_SKIPPED)


def drafter_of(request: Request, options: DraftOptions | None) -> Drafter | None:
    """A drafter, if several tokens of the request can be verified at once; else None.

    Penalties and grammars depend on each token before the next one is sampled; hidden states and experts are returned
    once for every position.
    """
    params = request.params
    looks_back = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    returned_by_position = request.return_hidden_states or request.return_routed_experts
    if options is None or request.task != "generate" or looks_back or params.grammar or returned_by_position:
        return None
    return Drafter(options)
