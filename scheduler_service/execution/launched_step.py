"""What the worker keeps of each admitted request, and a step between its launch and its results.

The tokens of a step stay on the device until `LaunchedStep.finish` takes them to the host. The next step may be
launched before: it reads them on the device. What only the host can do with a token (penalties, grammars) happens in
`finish`.
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
from quartet.scheduler_service.sampling.rows import Row

TOO_COSTLY = "The output cannot be constrained any further: {}"
NOTHING_ALLOWED = "No token is left that both the grammar and the other parameters allow."
AT_ONCE = 16  # rows that matrix products on a CPU take together: with fewer, one more costs next to nothing
MOST_LOOKED_AT = 4096  # tokens in a step: the matcher looks at all that is forced behind each one that is taken


@dataclass(slots=True)
class State:
    """What the worker keeps of an admitted request. It is a function of the request's tokens."""

    row: Row
    runs: PageRuns
    last_token: int = 0  # sampled, perhaps not committed yet
    unseen: int = 0  # tokens sampled after that one which the host has not seen
    matcher: Matcher | None = None  # its state in the grammar
    jumps: bool = False  # tokens that the grammar forces are not drawn

    @property
    def needs_tokens_on_host(self) -> bool:
        """Whether the host needs all earlier tokens before it can draw the next one."""
        return self.matcher is not None or self.row.needs_output(self.unseen)

    def take(self, token: int) -> bool:
        """Note a sampled token; returns whether it completes the output by its grammar."""
        self.last_token = token
        self.row.add(token)
        if self.matcher is None:
            return False
        self.matcher.accept(token)
        return self.matcher.finished

    def take_forced(self, result: Result, most: int) -> int:
        """Take the tokens that the grammar forces behind those of the result, and add them there; returns how many.

        Each is the only one that the mask would have allowed. One that would end the request too early is left to a
        draw, which has nothing to draw then.
        """
        assert self.matcher is not None and result.tokens is not None
        forbidden = self.row.end_ids if self.row.params.min_new_tokens else ()
        count = looked_at = 0
        while count < most and looked_at < MOST_LOOKED_AT and not result.complete:
            forced = self.matcher.forced()
            if not forced or forced[0] in forbidden:
                break
            result.complete = self.take(forced[0])
            result.tokens.append(forced[0])
            count, looked_at = count + 1, looked_at + len(forced)
        return count

    def fault(self, valid: bool) -> tuple[str, Kind] | None:
        """Why the drawn token cannot be used; None if it can. `valid`: the largest logit was finite."""
        if self.matcher is not None and self.matcher.failed:
            return TOO_COSTLY.format(self.matcher.error), Kind.BAD_REQUEST
        if valid:
            return None
        return (NAN_HAPPENED, Kind.INTERNAL) if self.matcher is None else (NOTHING_ALLOWED, Kind.BAD_REQUEST)


@dataclass(slots=True)
class Drawn:
    """The tokens of a step, while they are copied to the host."""

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
class LaunchedStep:
    """A step that was launched. Its results are complete after `finish`."""

    results: list[Result]
    drawn: Drawn | None = None  # None: it drew no tokens, or is finished
    verified: dict[int, int] = field(default_factory=dict)  # slot → the last token that counts of several drawn

    def finish(self) -> None:
        """Wait for the step's tokens and fill in the results; a second call changes nothing."""
        drawn, self.drawn = self.drawn, None
        if drawn is None:
            return
        drawn.arrival.wait()
        tokens, valid, logprobs = drawn.tokens.tolist(), drawn.valid.tolist(), drawn.logprobs.by_row()
        row, spare = 0, -len(drawn.slices) % AT_ONCE  # what the next step computes besides a row of each
        for i, share, state in zip(drawn.sampled, drawn.slices, drawn.states, strict=True):
            first, result, drafts = row, self.results[i], share.drafts
            row += 1 + len(drafts)
            state.unseen -= 1
            if fault := state.fault(valid[first]):
                result.error, result.error_kind = fault
                continue
            end = first + (accepted(drafts, tokens[first:row], valid[first:row]) if drafts else 1)
            count = 0
            while first + count < end and not result.complete:
                result.complete = state.take(tokens[first + count])
                count += 1
            result.tokens = tokens[first : first + count]
            result.logprobs = [scores for scores in logprobs[first : first + count] if scores]
            if state.jumps and spare:
                spare -= state.take_forced(result, spare)
            if drafts or count < len(result.tokens):
                self.verified[share.sequence.slot] = state.last_token
