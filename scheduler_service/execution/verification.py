"""Several tokens of a request from one step: the rows of logits that a plan draws from, and which of the draws count.

A draft is read as if it were known. The draw behind each of its tokens is the one that would have been made had the
token been drawn and not drafted, since it depends on nothing but logits, parameters, seed and position. So whatever
was drawn behind a wrong token is dropped, the rest is kept, and the output is the one without drafts.
"""

from collections.abc import Sequence as Run
from dataclasses import dataclass

from quartet.scheduler_service.core.plan import Plan, Slice


@dataclass(slots=True)
class LogitRows:
    """The rows of a step's logits, side by side: one behind the last token of a slice, and one behind each draft."""

    sampled: list[int]  # slices that draw
    slices: list[int]  # by row: the slice it belongs to
    positions: list[int]  # by row: where the token is to stand that is drawn from it

    def places(self, plan: Plan, offsets: list[int]) -> list[int]:
        """By row: where its hidden state is among those of the step, whose slices begin at `offsets`."""
        columns = zip(self.slices, self.positions, strict=True)
        return [offsets[i] + position - 1 - plan.slices[i].start for i, position in columns]


def logit_rows(plan: Plan, sampled: list[int]) -> LogitRows:
    """The rows for the slices `sampled`."""
    slices = plan.slices
    if not plan.verifications:
        return LogitRows(sampled, sampled, [slices[i].end for i in sampled])
    pairs = [(i, position) for i in sampled for position in drawn_positions(slices[i])]
    return LogitRows(sampled, [i for i, _ in pairs], [position for _, position in pairs])


def drawn_positions(share: Slice) -> range:
    return range(share.end - len(share.drafts), share.end + 1)


def accepted(drafts: Run[int], tokens: Run[int], valid: Run[bool]) -> int:
    """How many of the tokens, one drawn in front of each draft and one behind the last, are those of the output.

    The first is. A draw that is none is left to a step of its own, like all that comes behind it.
    """
    count = 1
    while count <= len(drafts) and drafts[count - 1] == tokens[count - 1] and valid[count]:
        count += 1
    return count
