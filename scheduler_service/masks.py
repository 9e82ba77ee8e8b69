"""Which tokens the grammars of a step allow: worked out on threads of its own while the model runs."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from scheduler_service.grammar import Bitmask, MaskFiller, Matcher, bitmask_words

ALL_ALLOWED = -1  # 32 set bits
THREADS = 2


class Masks:
    """Makes the bit masks of constrained rows."""

    def __init__(self, vocab_size: int) -> None:
        self._words = bitmask_words(vocab_size)
        self._filler = MaskFiller(THREADS)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="masks")

    def start(self, matchers: Sequence[Matcher | None]) -> "Future[Bitmask] | None":
        """Begin with the masks of a step's rows; None where no row is constrained."""
        return self._thread.submit(self._fill, matchers) if any(matchers) else None

    def _fill(self, matchers: Sequence[Matcher | None]) -> Bitmask:
        bitmask = np.full((len(matchers), self._words), ALL_ALLOWED, dtype=np.int32)
        self._filler.fill([(matcher, row) for row, matcher in enumerate(matchers) if matcher], bitmask)
        for row, matcher in enumerate(matchers):
            if matcher and matcher.error:
                bitmask[row] = ALL_ALLOWED  # its request ends; the row must only not disturb the others
        return bitmask


def allowed(masks: "Future[Bitmask] | None", device: torch.device) -> torch.Tensor | None:
    """Wait for what `start` began: int32 (rows, words), see sampler.adjust."""
    return None if masks is None else torch.from_numpy(masks.result()).to(device, non_blocking=True)
