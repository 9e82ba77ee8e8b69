"""The progress bar of a checkpoint's shards, on stderr."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from quartet.runtime.log import say

Item = TypeVar("Item")
LABEL = "Loading safetensors checkpoint shards"


def with_progress(items: Sequence[Item]) -> Iterator[Item]:
    """Yield the items and print a line before the first and after each."""
    begun = time.monotonic()
    say(line(0, len(items), 0.0), sys.stderr)
    for done, item in enumerate(items, start=1):
        yield item
        say(line(done, len(items), time.monotonic() - begun), sys.stderr)


def line(done: int, total: int, elapsed_s: float) -> str:
    """For example `…: 100% Completed | 1/1 [00:02<00:00,  2.00s/it]`."""
    if not done or not elapsed_s:
        return f"{LABEL}: {100 * done // max(total, 1):3d}% Completed | {done}/{total} [00:00<?, ?it/s]"
    rate = done / elapsed_s
    speed = f"{rate:5.2f}it/s" if rate > 1 else f"{1 / rate:5.2f}s/it"
    remaining = clock((total - done) / rate)
    return f"{LABEL}: {100 * done // total:3d}% Completed | {done}/{total} [{clock(elapsed_s)}<{remaining}, {speed}]"


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"
