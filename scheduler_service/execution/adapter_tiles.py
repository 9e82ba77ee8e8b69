"""Which tokens of a step have which LoRA adapter, on the device: uploaded for one step, or to a buffer that stays.

`owners` are the slots of the adapters of a step's slices, -1 for none.
"""

from collections.abc import Sequence

import torch

from quartet.kernels.reference.adapters import Run, most_tiles, tiles_of
from quartet.scheduler_service.host.transfer import upload
from quartet.scheduler_service.model.fused_adapters import StepTiles

NUMBERS = 4  # of a tile


def runs_of(owners: Sequence[int], offsets: Sequence[int], decodes: int = 0, shift: int = 0) -> list[Run]:
    """The tokens of each slice that has an adapter; slices behind the decode rows begin `shift` tokens later."""
    runs = []
    for i, slot in enumerate(owners):
        if slot >= 0:
            moved = 0 if i < decodes else shift
            runs.append((slot, offsets[i] + moved, offsets[i + 1] + moved))
    return runs


def uploaded(tokens: int, runs: Sequence[Run], ranks: Sequence[int], device: torch.device) -> StepTiles:
    """The tiles of one step of so many tokens; `ranks` by slot."""
    buffer = TileBuffer(tokens, len(ranks), device)
    buffer.send(tokens, runs, ranks)
    return buffer.of(tokens)


class TileBuffer:
    """Tiles for steps of any size up to a largest one; never moved. Those without tokens end at once."""

    def __init__(self, tokens: int, slots: int, device: torch.device) -> None:
        """`slots`: so many adapters at once."""
        self.slots = slots
        self.numbers = torch.zeros(sum(self.sizes(tokens)), dtype=torch.int32, device=device)
        self.sent: list[int] = []  # what the buffer begins with; the rest is zeros or was left by a larger step

    def of(self, tokens: int) -> StepTiles:
        """The tiles of a step of so many tokens."""
        sizes = self.sizes(tokens)
        tiles, ranks, order, owners = self.numbers[: sum(sizes)].split(sizes)
        return StepTiles(tiles.view(-1, NUMBERS), order[:tokens], owners[:tokens], ranks[: self.slots])

    def sizes(self, tokens: int) -> list[int]:
        """Of tiles, ranks, order and owners: whole vectors, so that all begin at such places."""
        wanted = NUMBERS * most_tiles(tokens, self.slots), self.slots, tokens, tokens
        return [-(-size // NUMBERS) * NUMBERS for size in wanted]

    def send(self, tokens: int, runs: Sequence[Run], ranks: Sequence[int]) -> None:
        """Upload the tiles of a step of so many tokens, unless they are there; `ranks` by slot."""
        tiles, order = tiles_of(runs, ranks)
        owners = [-1] * tokens
        for slot, begin, end in runs:
            owners[begin:end] = [slot] * (end - begin)
        parts = [number for one in tiles for number in one], list(ranks), order, owners
        numbers = [
            number
            for part, size in zip(parts, self.sizes(tokens), strict=True)
            for number in (*part, *[0] * (size - len(part)))
        ]
        if self.sent[: len(numbers)] != numbers:
            self.numbers[: len(numbers)].copy_(upload(numbers, self.numbers.device, torch.int32))
            self.sent = numbers

    def clear(self) -> None:
        """No token has an adapter, whatever the size."""
        self.numbers.zero_()
        self.sent = []
