"""The progress word: how the scheduler shows that it moves, without a message and without being asked.

The file `<run_dir>/progress` holds three native 64-bit integers, mapped by the scheduler that writes and by whoever
reads: the number of beats, the time of the last beat (CLOCK_MONOTONIC, nanoseconds, the same clock in every process),
and 1 while there is work. Each word is stored whole; a reader may see the words of two neighbouring
beats, which is harmless.
"""

import mmap
import os
import time
from pathlib import Path

FILE_NAME = "progress"
WORDS = 3
WORD_BYTES = 8
BEATS, BEAT_NS, BUSY = range(WORDS)


def _map(path: Path) -> "memoryview[int]":
    """The words of an existing file that is large enough."""
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), WORDS * WORD_BYTES)).cast("q")


class ProgressWord:
    """The scheduler's side. A restarted scheduler goes on counting in the same file."""

    def __init__(self, run_dir: str) -> None:
        path = Path(run_dir) / FILE_NAME
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, WORDS * WORD_BYTES)
        os.close(descriptor)
        self._words = _map(path)

    def beat(self, busy: bool) -> None:
        """Say: I have just moved; `busy` when there is work left."""
        words = self._words
        words[BUSY] = busy
        words[BEAT_NS] = time.monotonic_ns()
        words[BEATS] += 1


class ProgressReader:
    """Anyone's side. Before the first beat the age is infinite and nothing is busy."""

    def __init__(self, run_dir: str) -> None:
        self._path = Path(run_dir) / FILE_NAME
        self._words: memoryview[int] | None = None

    def beats(self) -> int:
        words = self._open()
        return words[BEATS] if words else 0

    def age_s(self) -> float:
        """Seconds since the scheduler last moved."""
        words = self._open()
        if not words or not words[BEATS]:
            return float("inf")
        return max(0.0, (time.monotonic_ns() - words[BEAT_NS]) / 1e9)

    def busy(self) -> bool:
        """Whether it had work at its last beat: an old beat means a long step then, not a lost wake-up."""
        words = self._open()
        return bool(words and words[BUSY])

    def _open(self) -> "memoryview[int] | None":
        if self._words is None and self._path.is_file() and self._path.stat().st_size >= WORDS * WORD_BYTES:
            self._words = _map(self._path)
        return self._words
