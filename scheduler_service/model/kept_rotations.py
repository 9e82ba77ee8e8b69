"""Rotations of single tokens, kept with those of their neighbours.

Made alone, those of one token take a third of a millisecond: torch's operations on few numbers wait for code and data
that the weights of a step have driven out of the caches.
"""

from collections.abc import Callable

import torch

from quartet.scheduler_service.model.backend import Rotation

POSITIONS = 256  # that are made at once
MOST_BLOCKS = 16  # of so many positions


class KeptRotations:
    """The rotations that `make` gives for positions (tokens,), by rope."""

    def __init__(self, make: Callable[[torch.Tensor], list[Rotation]]) -> None:
        self.make = make
        self.blocks: dict[int, list[Rotation]] = {}

    def at(self, position: int) -> list[Rotation]:
        """Those of one token."""
        block, place = divmod(position, POSITIONS)
        if block not in self.blocks:
            if len(self.blocks) == MOST_BLOCKS:
                self.blocks.clear()
            self.blocks[block] = self.make(torch.arange(block * POSITIONS, (block + 1) * POSITIONS))
        return [(cos[place : place + 1], sin[place : place + 1]) for cos, sin in self.blocks[block]]
