"""Tells whether a file was written to or replaced between two looks at it."""

import os
from pathlib import Path
from typing import NamedTuple

from quartet.scheduler_service.weights.checkpoint import CheckpointError


class FileIdentity(NamedTuple):
    """What changes when a file is written to or replaced."""

    device: int
    inode: int
    size: int
    written_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileIdentity":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def stat_file(file: Path) -> os.stat_result:
    """Raises CheckpointError where that fails."""
    try:
        return file.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def identity_of(file: Path) -> FileIdentity:
    """Raises CheckpointError."""
    return FileIdentity.of(stat_file(file))
