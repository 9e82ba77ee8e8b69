"""What stays on the device from step to step, by slot. One more slot than there are requests: padding uses the last."""

from collections.abc import Sequence

import torch

from scheduler_service.transfer import upload


class SlotTokens:
    """The token that was sampled last, for each slot: the next step's input, before the host has seen it."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.values = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    def write(self, slots: Sequence[int], tokens: torch.Tensor) -> None:
        """Keep tokens (rows,)."""
        self.values.index_copy_(0, upload(slots, self.values.device), tokens)

    def read(self, input_ids: torch.Tensor, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Put the tokens of some slots into rows of input_ids (tokens,)."""
        device = self.values.device
        input_ids.index_copy_(0, upload(rows, device), self.values[upload(slots, device)])
