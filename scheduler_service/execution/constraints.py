"""The grammars of a step: the masks of its rows."""

import torch

from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.steps import Step
from quartet.scheduler_service.grammar.masks import Begun, Masks
from quartet.scheduler_service.grammar.matchers import Bitmask, Grammar, Matcher
from quartet.scheduler_service.host.transfer import page_locked


class Constraints:
    """Applies the grammars of steps to their draws."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self._last: tuple[Bitmask, torch.Tensor] | None = None  # the same memory, seen twice

    def start(self, step: Step, *, awaited: bool = False) -> Begun | None:
        """Begin the masks of the rows that are drawn from; None where none is needed. `awaited`: see Masks.start."""
        sampled = [(step.states[i], step.plan.slices[i].drafts) for i in step.drawing.sampled]
        return self.masks.start([(state.matcher, drafts) for state, drafts in sampled], awaited=awaited)

    def finish(self, step: Step, masks: Begun | None) -> torch.Tensor | None:
        """Wait for the masks: int32 (rows, words), on the host.

        Where looking at drafts was too much for a matcher, there is a new one without drafts.
        """
        if masks is None:
            return None
        bitmask, row = masks.result(), 0
        for i in step.drawing.sampled if step.plan.verifications else ():
            share, state = step.plan.slices[i], step.states[i]
            if share.drafts and state.matcher is not None and state.matcher.failed:
                state.matcher = matcher = matcher_of(share.sequence)
                assert matcher is not None, share.sequence.rid
                self.masks.refill(bitmask, row, matcher)
            row += 1 + len(share.drafts)
        if self._last is None or self._last[0] is not bitmask:
            self._last = bitmask, torch.from_numpy(bitmask)
        return self._last[1]


def make_masks(vocab_size: int, device: torch.device, running: int) -> Masks:
    """The masks of steps on a device. A GPU copies them from where they are made, perhaps while the next are made."""
    if device.type != "cuda":
        return Masks(vocab_size)

    def room(rows: int, words: int) -> Bitmask:
        # At once for all that can run: while more is made, the device may still copy from what there was.
        made: Bitmask = page_locked((max(rows, running), words), torch.int32).numpy()
        return made

    return Masks(vocab_size, rooms=2, make_room=room)


def matcher_of(sequence: Sequence) -> Matcher | None:
    """The matcher behind what the sequence has generated, where a grammar constrains it."""
    grammar = sequence.grammar
    return grammar.matcher(sequence.ids[sequence.prompt_len :]) if isinstance(grammar, Grammar) else None
