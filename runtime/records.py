"""Small records that outlast a process: one file each in the run directory, replaced as a whole.

Nothing is forced to the disk, so that the scheduler's loop may write them too: a run directory does not outlast the
machine, and what a killed process has written is there.
"""

import contextlib
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
    fresh.write_bytes(msgspec.json.encode(record))
    with contextlib.suppress(FileExistsError):
        os.link(fresh, path)
    fresh.unlink()


def read_record(run_dir: str, name: str, kind: type[Record]) -> Record | None:
    """What was written last, if anything was."""
    try:
        return msgspec.json.decode((Path(run_dir) / name).read_bytes(), type=kind)
    except FileNotFoundError:
        return None
