"""What a process has used, as the kernel counts it: CPU time and memory."""

import os
from dataclasses import dataclass
from pathlib import Path

from quartet.runtime.process.vitals import fields_of

# fields of /proc/<pid>/stat behind the name: the state is the first
USER_TICKS, SYSTEM_TICKS, RESIDENT_PAGES = 11, 12, 21
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process, all threads together."""

    cpu_s: float  # since it began
    resident_bytes: int


def usage_of(pid: int, root: Path = Path("/proc")) -> Usage | None:
    """What a process has used; None where the kernel does not tell, or it has ended."""
    try:
        _, fields = fields_of(root / str(pid))
        ticks = int(fields[USER_TICKS]) + int(fields[SYSTEM_TICKS])
        return Usage(ticks / TICKS_PER_S, int(fields[RESIDENT_PAGES]) * PAGE_BYTES)
    except (OSError, ValueError, IndexError):
        return None
