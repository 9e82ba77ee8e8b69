"""Where the start of a process spends its time: wall time and processor time by phase, in one line of the log.

One stopwatch for a process, as there is one log.
"""

import os
import time
from pathlib import Path

Phase = tuple[str, float, float]  # its name, seconds of wall time, seconds of processor time


class Stopwatch:
    """Counts from the creation of its process on."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._wall, self._processor = time.monotonic() - age_s(), 0.0

    def mark(self, phase: str) -> None:
        """What was done since the last mark was this."""
        wall, processor = time.monotonic(), time.process_time()
        self.phases.append((phase, wall - self._wall, processor - self._processor))
        self._wall, self._processor = wall, processor

    def skip_wait(self) -> None:
        """The time since the last mark was spent waiting for work."""
        self._wall = time.monotonic()

    def story(self) -> str:
        """All phases in words."""
        parts = ", ".join(f"{name} {wall:.2f} ({processor:.2f})" for name, wall, processor in self.phases)
        wall_s = sum(wall for _, wall, _ in self.phases)
        processor_s = sum(processor for _, _, processor in self.phases)
        return f"{wall_s:.2f} s ({processor_s:.2f} s of processor time): {parts}"


def age_s() -> float:
    """Seconds since this process was created."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    created_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the machine's start
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - created_s)


STOPWATCH = Stopwatch()
mark = STOPWATCH.mark
