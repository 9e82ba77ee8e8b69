"""The progress word: how a service shows that it moves, without a message and without being asked.

The file `<run_dir>/<role>.progress` holds native 64-bit integers, mapped by the service that writes and by whoever
reads. Two things are counted:

beats   of the service's own loop: once a turn, and once a second while it waits. They stop while one step takes long,
        and `busy` says whether it had work at the last one.
pulses  of a second thread, once a second. They stop where the process does not run, or hardly, and where something
        keeps the interpreter from every other thread. Which it is, `runtime/launcher/watchdog.py` finds out.

Times are CLOCK_MONOTONIC in nanoseconds, the same clock in every process. Each word is stored whole; a reader may see
the words of two neighbouring beats, which is harmless.
"""

import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from quartet.runtime.process import vitals

WORDS = 6
WORD_BYTES = 8
BEATS, BEAT_NS, BUSY, PULSES, PULSE_NS, PID = range(WORDS)
IDLE_BEAT_S = 1.0  # a service that waits wakes this often, so that its beats go on
PULSE_S = 1.0
SILENT_S = 2.0  # without a pulse: from then on the kernel is asked whether the process runs


def _path(run_dir: str, role: str) -> Path:
    return Path(run_dir) / f"{role}.progress"


def _map(path: Path) -> "memoryview[int]":
    """The words of an existing file that is large enough."""
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), WORDS * WORD_BYTES)).cast("q")


class ProgressWord:
    """The service's side. One that is started again goes on counting in the same file."""

    def __init__(self, run_dir: str, role: str) -> None:
        path = _path(run_dir, role)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(descriptor, 0, WORDS * WORD_BYTES)  # on a full disk this fails, and not the first beat
        os.close(descriptor)
        self._words = _map(path)
        self._words[PID] = os.getpid()

    def beat(self, busy: bool) -> None:
        """Say: I have just moved; `busy` when there is work left."""
        words = self._words
        words[BUSY] = busy
        words[BEAT_NS] = time.monotonic_ns()
        words[BEATS] += 1

    def wait(self) -> None:
        """Say: I still wait for another process, with work left."""
        self.beat(busy=True)

    def pulse(self) -> None:
        """Say: this process runs."""
        words = self._words
        words[PULSE_NS] = time.monotonic_ns()
        words[PULSES] += 1

    def start_pulse(self) -> None:
        """Pulse from a thread for as long as the process lives."""

        def run() -> None:
            while True:
                self.pulse()
                time.sleep(PULSE_S)

        threading.Thread(target=run, name="pulse", daemon=True).start()


class ProgressReader:
    """Anyone's side. Before the first beat the age is infinite and nothing is busy; likewise with pulses."""

    def __init__(self, run_dir: str, role: str) -> None:
        self._path = _path(run_dir, role)
        self._words: memoryview[int] | None = None

    def beats(self) -> int:
        return self._word(BEATS)

    def pulses(self) -> int:
        return self._word(PULSES)

    def age_s(self) -> float:
        """Seconds since the service's loop last moved."""
        return self._age_s(self.beats(), BEAT_NS)

    def pulse_age_s(self) -> float:
        """Seconds since the process was last seen to run: by its pulse or, where that is late, by the kernel.

        A process that has to wait for a core, or whose C code keeps the interpreter, has no pulse and is not dead.
        """
        age_s = self._age_s(self.pulses(), PULSE_NS)
        if not SILENT_S < age_s < float("inf"):
            return age_s
        seen = vitals.read_vitals(self._word(PID))
        runs = seen is not None and seen.state in (vitals.State.RUNNABLE, vitals.State.BLOCKED)
        return 0.0 if runs else age_s

    def pid(self) -> int:
        """Of the incarnation that wrote last; 0 before the first."""
        return self._word(PID)

    def busy(self) -> bool:
        """Whether it had work at its last beat: an old beat means a long step then, not a lost wake-up."""
        return bool(self._word(BUSY))

    def _age_s(self, count: int, at: int) -> float:
        return max(0.0, (time.monotonic_ns() - self._word(at)) / 1e9) if count else float("inf")

    def _word(self, index: int) -> int:
        words = self._open()
        return words[index] if words else 0

    def _open(self) -> "memoryview[int] | None":
        if self._words is None and self._path.is_file() and self._path.stat().st_size >= WORDS * WORD_BYTES:
            self._words = _map(self._path)
        return self._words


class SlowestProgress:
    """Of several processes the one that has not moved for longest, among those with work where there are such."""

    def __init__(self, readers: Sequence[ProgressReader]) -> None:
        self._readers = readers

    def _slowest(self) -> ProgressReader:
        return max(self._readers, key=lambda reader: (reader.busy(), reader.age_s()))

    def beats(self) -> int:
        return sum(reader.beats() for reader in self._readers)

    def age_s(self) -> float:
        return self._slowest().age_s()

    def busy(self) -> bool:
        return self._slowest().busy()
