"""Which process listens on a port, as far as the kernel tells this user."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LISTENING = "0A"
TABLES = ("net/tcp", "net/tcp6")


class Holder(NamedTuple):
    """A process that listens."""

    pid: int
    command: str  # how it was started, or the title that it gave itself


def holder_of(port: int, root: Path = Path("/proc")) -> Holder | None:
    """The process that took the port, rather than those that it handed the socket to; None where nobody can tell."""
    sockets = {f"socket:[{inode}]" for inode in listening(port, root)}
    if not sockets:
        return None
    holders = [directory for directory in processes(root) if holds(directory, sockets)]
    pids = {int(directory.name) for directory in holders}
    first = next((each for each in holders if parent_of(each) not in pids), None)
    return None if first is None else Holder(int(first.name), command_of(first))


def listening(port: int, root: Path) -> Iterator[str]:
    """The inodes of the sockets that listen on a port."""
    for table in TABLES:
        try:
            lines = (root / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENING and int(local.rpartition(":")[2], 16) == port:
                yield inode


def processes(root: Path) -> list[Path]:
    """The directories of all processes, the oldest numbers first."""
    try:
        return sorted((each for each in root.iterdir() if each.name.isdigit()), key=lambda each: int(each.name))
    except OSError:
        return []


def holds(directory: Path, sockets: Iterable[str]) -> bool:
    """Whether a process has one of these sockets; False for one of another user."""
    try:
        return any(str(entry.readlink()) in sockets for entry in (directory / "fd").iterdir())
    except OSError:  # another's, or it has ended, or closed the file meanwhile
        return False


def parent_of(directory: Path) -> int:
    try:
        return int((directory / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def command_of(directory: Path) -> str:
    try:
        return " ".join((directory / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split())
    except OSError:
        return ""
