"""Small records that outlast a process: one file each in the run directory, replaced as a whole.

Nothing is forced to the disk, so that the scheduler's loop may write them too: a run directory does not outlast the
machine, and what a killed process has written is there.
"""

import os
from pathlib import Path
from typing import TypeVar

import msgspec

Record = TypeVar("Record", bound=msgspec.Struct)


def write(run_dir: str, name: str, record: msgspec.Struct) -> None:
    """Replace the record: whoever is killed at any moment leaves the old or the new one. Raises OSError."""
    path = Path(run_dir) / name
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(record))
    fresh.replace(path)


def write_first(run_dir: str, name: str, record: msgspec.Struct) -> None:
    """Write the record, as a whole, unless another process has. Raises OSError."""
    path = Path(run_dir) / name
    fresh = path.with_suffix(f".{os.getpid()}")
    try:
        fresh.write_bytes(msgspec.json.encode(record))
        _place(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _place(fresh: Path, path: Path) -> None:
    """Give a file this name too, unless there is one."""
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: of processes that look in the same moment, the last one writes
        if not path.exists():
            fresh.replace(path)


def read_record(run_dir: str, name: str, kind: type[Record]) -> Record | None:
    """What was written last, if anything was."""
    try:
        return msgspec.json.decode((Path(run_dir) / name).read_bytes(), type=kind)
    except FileNotFoundError:
        return None
