"""Small records that outlast a process: one file each in the run directory, replaced as a whole."""

import os
from pathlib import Path
from typing import TypeVar

import msgspec

Record = TypeVar("Record", bound=msgspec.Struct)


def write(run_dir: str, name: str, record: msgspec.Struct) -> None:
    """Replace the record; afterwards it survives a crash, and before that the old one does. Raises OSError."""
    path = Path(run_dir) / name
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as stream:
        stream.write(msgspec.json.encode(record))
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)
    descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(run_dir: str, name: str, kind: type[Record]) -> Record | None:
    """What was written last, if anything was."""
    try:
        return msgspec.json.decode((Path(run_dir) / name).read_bytes(), type=kind)
    except FileNotFoundError:
        return None
