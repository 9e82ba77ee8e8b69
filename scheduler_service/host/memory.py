"""The process's memory, which the C library keeps when it is freed (`runtime/launcher/launch.py` says why)."""

from collections.abc import Callable, Iterable

import torch

PIECE_BYTES = 1 << 20
PAGE_BYTES = 4096


def warm(sizes: Iterable[int], yield_point: Callable[[], None]) -> None:
    """Have the system back the memory that tensors of these sizes (bytes), made next, will get.

    Otherwise that happens while they are written to, at ten times the cost of writing. Calls `yield_point` after each
    piece.
    """
    held = []
    for size in sizes:
        memory = torch.empty(size, dtype=torch.uint8)
        held.append(memory)
        for start in range(0, size, PIECE_BYTES):
            memory[start : start + PIECE_BYTES : PAGE_BYTES] = 0
            yield_point()
