"""A launched step: what each admitted request keeps from step to step, and what comes back when a step has landed.

The tokens of a step stay on the device until somebody settles it. The next step may be launched before: it reads them
there. What only the host can do with a token (penalties, grammars) waits for `settle`.
"""

from dataclasses import dataclass, field

import torch

from quartet.runtime.errors import Kind
from quartet.scheduler_service.core.plan import NAN_HAPPENED, Result, Slice
from quartet.scheduler_service.execution.inputs import PageRuns
from quartet.scheduler_service.execution.logprobs import OutputScores
from quartet.scheduler_service.execution.verification import accepted
from quartet.scheduler_service.grammar.matchers import Matcher
from quartet.scheduler_service.host.transfer import Arrival
from quartet.scheduler_service.sampling.rows import Feature
from quartet.scheduler_service.sampling.state import Row

TOO_COSTLY = "The output cannot be constrained any further: {}"
NOTHING_ALLOWED = "No token is left that both the grammar and the other parameters allow."


@dataclass(slots=True)
class State:
    """What the worker keeps of an admitted request. It follows from the request's tokens, so it can be made anew."""

    row: Row
    runs: PageRuns
    last_token: int = 0  # sampled, perhaps not committed yet
    unseen: int = 0  # tokens sampled after that one which the host has not seen
    matcher: Matcher | None = None  # how far it has come in its grammar

    @property
    def looks_back(self) -> bool:
        """Whether its next token depends on the ones before in a way that only the host can follow."""
        return self.matcher is not None or bool(self.row.features & Feature.PENALTY)

    def take(self, token: int) -> None:
        """Note a sampled token."""
        self.last_token = token
        self.row.add(token)
        if self.matcher is not None:
            self.matcher.accept(token)

    def fault(self, valid: bool) -> tuple[str, Kind] | None:
        """Why the token that was just drawn is none. `valid`: some token had a finite largest logit."""
        if self.matcher is not None and self.matcher.error:
            return TOO_COSTLY.format(self.matcher.error), Kind.BAD_REQUEST
        if valid:
            return None
        return (NAN_HAPPENED, Kind.INTERNAL) if self.matcher is None else (NOTHING_ALLOWED, Kind.BAD_REQUEST)


@dataclass(slots=True)
class Drawn:
    """The tokens of a step, on their way to the host."""

    sampled: list[int]  # the slices that drew, by their place in the plan
    slices: list[Slice]  # those
    states: list[State]  # theirs
    tokens: torch.Tensor  # (rows,) int64: one of each slice, and one more for each of its drafts
    valid: torch.Tensor  # (rows,) bool
    logprobs: OutputScores
    arrival: Arrival

    def __post_init__(self) -> None:
        for state in self.states:
            state.unseen += 1


@dataclass(slots=True)
class Pending:
    """A launched step. Its results are complete once it is settled."""

    results: list[Result]
    drawn: Drawn | None = None  # until then
    verified: dict[int, int] = field(default_factory=dict)  # slot → the last token that counts of several drawn

    def settle(self) -> None:
        """Wait for the step's tokens and take them in; a second call changes nothing."""
        drawn, self.drawn = self.drawn, None
        if drawn is None:
            return
        drawn.arrival.wait()
        tokens, valid, logprobs = drawn.tokens.tolist(), drawn.valid.tolist(), drawn.logprobs.by_row()
        row = 0
        for i, share, state in zip(drawn.sampled, drawn.slices, drawn.states, strict=True):
            first, result, drafts = row, self.results[i], share.drafts
            row += 1 + len(drafts)
            state.unseen -= 1
            if fault := state.fault(valid[first]):
                result.error, result.error_kind = fault
                continue
            end = first + (accepted(drafts, tokens[first:row], valid[first:row]) if drafts else 1)
            result.tokens = tokens[first:end]
            result.logprobs = [scores for scores in logprobs[first:end] if scores]
            for token in result.tokens:
                state.take(token)
            if drafts:
                self.verified[share.sequence.slot] = state.last_token
            result.complete = state.matcher is not None and state.matcher.finished
