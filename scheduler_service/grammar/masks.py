"""Which tokens the grammars of a step allow.

Computed on the host between the launch of a step and its end, so a GPU computes the forward pass meanwhile. On a CPU
another thread would only take a core from the forward pass; most masks take less time than waking it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from quartet.scheduler_service.grammar.matchers import Bitmask, MaskFiller, Matcher, bitmask_words
from quartet.scheduler_service.host.transfer import send

ALL_ALLOWED = -1  # 32 set bits
THREADS = 2


class Masks:
    """Makes the bit masks of constrained rows."""

    def __init__(self, vocab_size: int) -> None:
        self._words = bitmask_words(vocab_size)
        self._filler = MaskFiller(THREADS)

    def start(self, matchers: Sequence[Matcher | None]) -> Bitmask | None:
        """The masks of a step's rows; None where no row is constrained."""
        if not any(matchers):
            return None
        bitmask = np.full((len(matchers), self._words), ALL_ALLOWED, dtype=np.int32)
        self._filler.fill([(matcher, row) for row, matcher in enumerate(matchers) if matcher], bitmask)
        for row, matcher in enumerate(matchers):
            if matcher and matcher.error:
                bitmask[row] = ALL_ALLOWED  # its request ends; the row must only not fail the others
        return bitmask


def allowed(masks: Bitmask | None, device: torch.device) -> torch.Tensor | None:
    """The masks as Backend.sample takes them: int32 (rows, words)."""
    return None if masks is None else send(torch.from_numpy(masks), device)
