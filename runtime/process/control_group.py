"""The control groups of this process, of version 2 and of version 1: the directories that hold their limits.

A group's limit holds for all groups below it, so whoever asks for a limit looks at every directory from the process's
own up to the highest that can be seen. In a container that is often one directory alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ESCAPE = re.compile(r"\\([0-7]{3})")  # of blanks in /proc/self/mountinfo
UNLIMITED = 1 << 60  # what version 1 writes for "no limit" is near 2^63


@dataclass(frozen=True, slots=True)
class Directory:
    """One group's files."""

    path: Path
    version: int
    name: str  # as the kernel calls the group

    def number(self, file: str) -> int | None:
        """The number in a file; None where there is no such file, no number in it, or one that means "no limit"."""
        words = self.words(file)
        if not words or not words[0].lstrip("-").isdigit():
            return None
        number = int(words[0])
        return number if 0 <= number < UNLIMITED else None

    def entry(self, file: str, key: str) -> int:
        """The number behind a key of a file such as memory.stat; 0 where it is missing."""
        words = self.words(file)
        pairs = zip(words[::2], words[1::2], strict=False)
        return next((int(value) for name, value in pairs if name == key and value.isdigit()), 0)

    def words(self, file: str) -> list[str]:
        try:
            return (self.path / file).read_text().split()
        except (OSError, UnicodeDecodeError):
            return []


def directories(controller: str, root: Path = Path("/")) -> list[Directory]:
    """The groups that a controller may limit this process by, each with those above it, its own ones first.

    `root`: where /proc and the mounted control groups are found.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found: list[Directory] = []
    for line in memberships:
        number, controllers, group = line.split(":", 2)
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        for mounted, at in mounted_at(mounts, version, controller):
            found += up_to_the_mount(group, mounted, root / at.lstrip("/"), version)
    return found


def mounted_at(mounts: list[str], version: int, controller: str) -> Iterator[tuple[str, str]]:
    """(group, path) of each mount of a hierarchy: which group is seen at which path."""
    for line in mounts:
        front, _, back = line.partition(" - ")
        fields, (kind, _, options) = front.split(), back.split(maxsplit=2)
        wanted = kind == "cgroup2" if version == 2 else kind == "cgroup" and controller in options.strip().split(",")
        if wanted:
            yield unescaped(fields[3]), unescaped(fields[4])


def unescaped(path: str) -> str:
    return ESCAPE.sub(lambda match: chr(int(match[1], 8)), path)


def up_to_the_mount(group: str, mounted: str, top: Path, version: int) -> list[Directory]:
    """The directories of a group and those above it. A group that the mount does not show is taken for the mounted one.

    In a container the kernel may name the group as the host sees it, while only that group is mounted.
    """
    prefix = mounted.rstrip("/")
    inside = group[len(prefix) :] if group == mounted or group.startswith(f"{prefix}/") else ""
    parts = [part for part in inside.split("/") if part]
    if ".." in parts:
        parts = []
    names = [parts[:length] for length in range(len(parts), -1, -1)]
    return [Directory(top.joinpath(*name), version, "/".join([prefix, *name]) or "/") for name in names]
