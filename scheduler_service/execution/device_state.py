"""What stays on the device from step to step, by slot. One more slot than there are requests: padding uses the last.

The host sends what is new and nothing else: the tokens it has not seen, pages as they are added.
"""

from collections.abc import Sequence as QuantizedRows

import torch

from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.host.transfer import upload


class SlotTokens:
    """The token that was sampled last, for each slot: the next step's input, before the host has seen it."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.values = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    @property
    def null_slot(self) -> int:
        return len(self.values) - 1

    def write(self, slots: QuantizedRows[int], tokens: torch.Tensor) -> None:
        """Keep tokens (rows,)."""
        self.values.index_copy_(0, upload(slots, self.values.device, torch.int64), tokens)

    def read(self, input_ids: torch.Tensor, rows: QuantizedRows[int], slots: QuantizedRows[int]) -> None:
        """Put the tokens of some slots into rows of input_ids (tokens,)."""
        device = self.values.device
        input_ids.index_copy_(0, upload(rows, device), self.values[upload(slots, device)])


class SlotPositions:
    """The position of the next decode step, for each slot. Recorded steps move it on by themselves."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.values = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.finished = torch.zeros(slots + 1, dtype=torch.int32, device=device)  # slots that a step passes over
        self.finished[slots] = 1
        self._held = [0] * (slots + 1)  # what the device will hold after all launched steps

    def advance(self, slots: QuantizedRows[int], positions: QuantizedRows[int]) -> list[int]:
        """Before a recorded step of these slots at these positions: send those that the device does not have.

        Returns which these were.
        """
        held = self._held
        moved = [i for i, slot in enumerate(slots) if held[slot] != positions[i]]
        if moved:
            device = self.values.device
            places = upload([slots[i] for i in moved], device)
            self.values.index_copy_(0, places, upload([positions[i] for i in moved], device))
        for slot, position in zip(slots, positions, strict=True):
            held[slot] = position + 1
        return moved

    def forget(self) -> None:
        """A step may not have run: send all positions again."""
        self._held = [-1] * len(self._held)


class PageTable:
    """The pages of every slot: (slots + 1, pages of the longest sequence) int32. The null slot has null pages."""

    def __init__(self, slots: int, pages: int, device: torch.device) -> None:
        self.values = torch.zeros(slots + 1, pages, dtype=torch.int32, device=device)
        self._listed: dict[int, tuple[list[int], int]] = {}  # slot → its list of pages, how many of it are here

    def forget(self) -> None:
        """Pages may not have been sent: send all again."""
        self._listed.clear()

    def update(self, sequences: QuantizedRows[Sequence]) -> None:
        """Send the pages that are new since the last update. While a sequence is admitted its list only grows."""
        places: list[int] = []
        pages: list[int] = []
        width = self.values.shape[1]
        for sequence in sequences:
            own = sequence.pages
            known, listed = self._listed.get(sequence.slot, (None, 0))
            if known is not own:  # a new admission brings a new list
                listed = 0
            elif listed == len(own):
                continue
            first = sequence.slot * width
            places.extend(range(first + listed, first + len(own)))
            pages.extend(own[listed:])
            self._listed[sequence.slot] = own, len(own)
        if places:
            device = self.values.device
            self.values.view(-1).index_copy_(0, upload(places, device), upload(pages, device, torch.int32))
