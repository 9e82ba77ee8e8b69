"""Steps recorded once per size and replayed: the host then gives one order a step instead of a few hundred.

A step of n decode rows runs at the next larger recorded size; the rows beyond n point at the null slot and the null
page and harm nobody. Attention's launch grows with the longest context it must cover, so there are sizes of that, too.
Steps with prompts (fused_prefill.py) have a size of their prompts' tokens besides. Steps in which a request has a LoRA
adapter are recorded apart from those without, which cost what they cost a server that takes none.

The largest sizes are recorded first, into one pool of memory, which the smaller ones then share. A few sizes are there
before the server is ready; the rest follow while it is idle, and what is missing meanwhile runs unrecorded, by the
same code on the same buffers. A graph keeps addresses: weights, KV pool, page table and buffers must stay where they
are. A swap of weights copies into place, so graphs survive it; what gives memory back must call `forget`.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from quartet.scheduler_service.host.device import available_gb

log = logging.getLogger(__name__)

Work = Callable[[], None]

FIRST_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # recorded before the server is ready
FIRST_LENGTH = 2048  # longest context of the smallest size; each further one is four times as long
LENGTH_FACTOR = 4
PATIENCE = 64  # steps of one size that may run unrecorded before it is recorded at once, idle or not
WARM_UPS = 2  # compile kernels and fill caches of memory before recording


@dataclass(frozen=True, order=True, slots=True)
class Key:
    """The size of a recorded step."""

    rows: int  # decode rows
    longest: int  # tokens of context that their attention covers
    tokens: int = 0  # of prompts
    adapters: bool = False  # whether it adds what LoRA adapters have


class Recorder(Protocol):
    """Turns work on fixed buffers into something that repeats it."""

    def record(self, work: Work) -> Work:
        """Record work that was done before, so that nothing is compiled any more; returns what repeats it."""
        ...


class PlainRecorder:
    """Records nothing: work is repeated by doing it. For devices without graphs, and for tests."""

    def record(self, work: Work) -> Work:
        return work


class CudaRecorder:
    """CUDA graphs in one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # waits for the device first; weights may be on their way to the device in another thread meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        replay: Work = graph.replay  # keeps the graph alive
        return replay


def row_sizes(largest: int) -> list[int]:
    """QuantizedRows of rows that are recorded: close to one another where a row costs most."""
    sizes = [1, 2, 3, 4, 6, 8, *range(12, 33, 4), *range(40, 65, 8), *range(80, 257, 16), *range(288, 513, 32)]
    below = [size for size in sizes if size < largest]
    return [*below, largest]


def length_sizes(context_length: int) -> list[int]:
    """Context lengths that are recorded."""
    sizes = []
    length = FIRST_LENGTH
    while length < context_length:
        sizes.append(length)
        length *= LENGTH_FACTOR
    return [*sizes, context_length]


def smallest(sizes: Sequence[int], least: int) -> int:
    """The smallest size that is large enough; sizes ascend."""
    return next(size for size in sizes if size >= least)


@dataclass(slots=True)
class Graphs:
    """Recorded steps by size.

    `compute(key)` is a step on the fixed buffers; `clear` points all their rows at the null slot.
    """

    compute: Callable[[Key], None]
    clear: Work
    recorder: Recorder
    rows: list[int]  # sizes, ascending
    lengths: list[int]
    tokens: list[int] = field(default_factory=lambda: [0])
    replays: dict[Key, Work] = field(default_factory=dict)
    waiting: deque[Key] = field(default_factory=deque)  # to be recorded when there is time
    misses: Counter[Key] = field(default_factory=Counter)
    adapters: bool = False  # whether there will be steps with LoRA adapters
    gigabytes: float = 0.0  # that the first sizes took

    def covers(self, rows: int, tokens: int = 0) -> bool:
        return rows <= self.rows[-1] and tokens <= self.tokens[-1]

    def key(self, rows: int, longest: int, tokens: int = 0, adapters: bool = False) -> Key:
        return Key(smallest(self.rows, rows), smallest(self.lengths, longest), smallest(self.tokens, tokens), adapters)

    def prepare(self, key: Key) -> None:
        """Before a step's inputs are there: record its size if it was missed often enough to be worth the pause."""
        if key in self.replays:
            return
        self.misses[key] += 1
        if self.misses[key] > PATIENCE:
            self.record(key)
        elif key not in self.waiting:
            self.waiting.append(key)

    def run(self, key: Key) -> None:
        """Do the step whose inputs are in the buffers: replayed, or computed as long as its size is not recorded."""
        replay = self.replays.get(key)
        if replay is None:
            self.compute(key)
        else:
            replay()

    def record(self, key: Key) -> None:
        """Record one size; whatever was in the buffers is gone."""
        self.clear()
        for _ in range(WARM_UPS):
            self.compute(key)
        self.replays[key] = self.recorder.record(lambda: self.compute(key))
        if key in self.waiting:
            self.waiting.remove(key)

    def begin(self, device: torch.device) -> None:
        """Record the first sizes, and note the others for later."""
        first = [size for size in self.rows if size in FIRST_ROWS]
        self.waiting.extend(Key(size, self.lengths[0]) for size in reversed(self.rows) if size not in first)
        if self.adapters:
            self.waiting.extend(Key(size, self.lengths[0], adapters=True) for size in reversed(first))
        available, begun = available_gb(device), time.monotonic()
        log.info("Capture cuda graph begin. This can take up to several minutes. avail mem=%.2f GB", available)
        log.info("Capture cuda graph bs %s", first)
        for size in reversed(first):
            log.debug("Capturing batches (bs=%d avail_mem=%.2f GB)", size, available_gb(device))
            self.record(Key(size, self.lengths[0]))
        left = available_gb(device)
        self.gigabytes = max(0.0, available - left)
        log.info(
            "Capture cuda graph end. Time elapsed: %.2f s. mem usage=%.2f GB. avail mem=%.2f GB.",
            time.monotonic() - begun,
            available - left,
            left,
        )

    def idle_work(self) -> bool:
        """Record one of the sizes that wait; returns whether there are more."""
        if self.waiting:
            self.record(self.waiting[0])
        return bool(self.waiting)

    def forget(self) -> None:
        """Drop all that is recorded: addresses have changed. It is recorded anew when there is time."""
        self.waiting.extend(key for key in sorted(self.replays, reverse=True) if key not in self.waiting)
        self.replays.clear()
