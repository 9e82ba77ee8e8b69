"""Drafts: tokens that probably come next, because they followed the same tokens before. Pure, like all of the core.

A draft is verified by computing it as if it were known: the draw behind each of its tokens says whether the next one
was right. Nothing depends on drafts but how many tokens a step gives, so they may be cut or left out at will.
"""

from array import array
from dataclasses import dataclass

from quartet.runtime.messages import Request
from quartet.scheduler_service.core.ngrams import NGrams

FIRST_DRAFT = 2  # tokens of a request's first draft
LONGEST_REST = 16  # chances passed over between two tries, where drafts keep failing


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """What the flags say."""

    tokens: int  # of a draft, at most
    shortest: int  # run of tokens that must have occurred before
    longest: int  # run that is compared
    rows: int = 64  # tokens that a step's decoding computes at most, drafts included


class Drafter:
    """Drafts for one request: more while they are right, fewer and then hardly any while they are wrong."""

    __slots__ = ("_ngrams", "_pause", "_rest", "allowance", "most")

    def __init__(self, options: DraftOptions) -> None:
        self.most = options.tokens
        self.allowance = min(FIRST_DRAFT, options.tokens)
        self._ngrams = NGrams(options.shortest, options.longest)
        self._rest = 0  # chances still to be passed over
        self._pause = 1  # how many after the next failure

    def propose(self, ids: "array[int]", most: int) -> tuple[int, ...]:
        """What may come behind `ids`: at most `most` tokens, often none."""
        if not self._ngrams.follow(ids):
            return ()
        draft = self._ngrams.continuation(ids, min(self.allowance, most))
        if draft and self._rest:
            self._rest -= 1
            return ()
        return draft

    def learn(self, proposed: int, correct: int) -> None:
        """A draft of `proposed` tokens was verified."""
        if correct == proposed:
            self.allowance = min(self.most, max(self.allowance, 2 * proposed))
        else:
            self.allowance = max(1, correct, self.allowance // 2)
        if correct:
            self._pause = 1
        elif proposed == 1:
            self._rest = self._pause
            self._pause = min(2 * self._pause, LONGEST_REST)


def drafter_of(request: Request, options: DraftOptions | None) -> Drafter | None:
    """A drafter, where a request's tokens can be verified several at once.

    Penalties and grammars look at each token before the next one is drawn; hidden states and experts are told once for
    every position.
    """
    params = request.params
    looks_back = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    told_by_position = request.return_hidden_states or request.return_routed_experts
    if options is None or request.task != "generate" or looks_back or params.grammar or told_by_position:
        return None
    return Drafter(options)
