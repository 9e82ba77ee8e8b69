"""The progress bar of a checkpoint's shards, on stderr."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from quartet.runtime.log import tell

LABEL = "Loading {} checkpoint shards"


def with_progress(files: Sequence[Path]) -> Iterator[Path]:
    """Yield the files of a checkpoint and print a line before the first and after each."""
    begun = time.monotonic()
    kind = "gguf" if any(file.suffix == ".gguf" for file in files) else "safetensors"
    tell(line(0, len(files), 0.0, kind))
    for done, file in enumerate(files, start=1):
        yield file
        tell(line(done, len(files), time.monotonic() - begun, kind))


def line(done: int, total: int, elapsed_s: float, kind: str = "safetensors") -> str:
    """For example `…: 100% Completed | 1/1 [00:02<00:00,  2.00s/it]`."""
    label = LABEL.format(kind)
    if not done or not elapsed_s:
        return f"{label}: {100 * done // max(total, 1):3d}% Completed | {done}/{total} [00:00<?, ?it/s]"
    rate = done / elapsed_s
    speed = f"{rate:5.2f}it/s" if rate > 1 else f"{1 / rate:5.2f}s/it"
    remaining = clock((total - done) / rate)
    return f"{label}: {100 * done // total:3d}% Completed | {done}/{total} [{clock(elapsed_s)}<{remaining}, {speed}]"


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"
