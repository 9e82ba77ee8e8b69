"""How much memory this server may still use: by the machine, its control groups and its own resource limits.

Whoever sizes something or takes much at once asks `look`, and nothing else reads /proc/meminfo. Whoever has freed much
calls `give_back`; `shrink` goes further, for --low-memory.
"""

import ctypes
import mmap
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quartet.runtime.process import control_group
from quartet.runtime.process.control_group import Directory

GB = 1 << 30
UNKNOWN = "no limit that could be found"
PAGE_BYTES = resource.getpagesize()
MAPPING = re.compile(  # of a file: begin, end, rights, and how much of it are pages of the process's own
    r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ [1-9]\d* +/.*$(?:\n[A-Z].*)*?\nAnonymous: +(\d+) kB$", re.MULTILINE
)
RLIMITS = (("RLIMIT_AS", resource.RLIMIT_AS, 0), ("RLIMIT_DATA", resource.RLIMIT_DATA, 5))  # columns of statm


@dataclass(frozen=True, slots=True)
class Memory:
    """One limit, in bytes."""

    available: int  # may still be taken
    total: int
    limit: str  # its name, for people


def look(root: Path = Path("/"), rlimit: Callable[[int], tuple[int, int]] = resource.getrlimit) -> Memory:
    """What may still be taken, by the limit that leaves the least; `total` is the smallest of all limits."""
    limits = [*of_the_machine(root), *of_control_groups(root), *of_the_process(root, rlimit)]
    if not limits:
        return Memory(control_group.UNLIMITED, control_group.UNLIMITED, UNKNOWN)
    tightest = min(limits, key=lambda limit: limit.available)
    return Memory(max(0, tightest.available), min(limit.total for limit in limits), tightest.limit)


def of_the_machine(root: Path) -> Iterator[Memory]:
    """All memory, and what the kernel thinks it can give without swapping."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return
    sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines) if rest}
    available = sizes.get("MemAvailable", sizes.get("MemFree"))
    if available is not None and "MemTotal" in sizes:
        yield Memory(available, sizes["MemTotal"], "this machine's memory")


def of_control_groups(root: Path) -> Iterator[Memory]:
    """The limits of all groups that this process is in. Files that nobody uses at the moment are no use of memory."""
    for group in control_group.directories("memory", root):
        yield from (of_version_2 if group.version == 2 else of_version_1)(group)


def of_version_2(group: Directory) -> Iterator[Memory]:
    used = (group.number("memory.current") or 0) - group.entry("memory.stat", "inactive_file")
    for file in ("memory.max", "memory.high"):
        if (limit := group.number(file)) is not None:
            yield Memory(limit - used, limit, f"{file} of the control group {group.name}")


def of_version_1(group: Directory) -> Iterator[Memory]:
    """The limits of a control group of version 1: its own, and the least of those above it."""
    used = (group.number("memory.usage_in_bytes") or 0) - group.entry("memory.stat", "total_inactive_file")
    beyond = group.entry("memory.stat", "hierarchical_memory_limit")  # of groups that cannot be seen, too
    for file, limit in (
        ("memory.limit_in_bytes", group.number("memory.limit_in_bytes")),
        ("hierarchical_memory_limit", beyond if 0 < beyond < control_group.UNLIMITED else None),
    ):
        if limit is not None:
            yield Memory(limit - used, limit, f"{file} of the control group {group.name}")


def of_the_process(root: Path, rlimit: Callable[[int], tuple[int, int]]) -> Iterator[Memory]:
    """What `ulimit` has set for this process."""
    for name, number, column in RLIMITS:
        limit = rlimit(number)[0]
        if limit != resource.RLIM_INFINITY:
            used = int((root / "proc/self/statm").read_text().split()[column]) * PAGE_BYTES
            yield Memory(limit - used, limit, name)


def in_words(size: int) -> str:
    """Bytes for people: `1.25 GB`, `340 MB`."""
    return f"{size / GB:.2f} GB" if size >= GB else f"{size / (1 << 20):.0f} MB"


def give_back() -> None:
    """Give the system what the C library keeps though it is free: what a start has read and parsed, for example."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def shrink() -> None:
    """Give back what is free, and unmap the pages of libraries and other files that this process has not changed.

    The start of a large library touches most of it once. What is used later comes back from the system's cache.
    """
    if unmap := getattr(ctypes.CDLL(None), "madvise", None):
        unmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for begin, end, rights, own_kb in MAPPING.findall(Path("/proc/self/smaps").read_text(errors="replace")):
            if "w" not in rights and own_kb == "0":
                unmap(int(begin, 16), int(end, 16) - int(begin, 16), mmap.MADV_DONTNEED)
    give_back()
