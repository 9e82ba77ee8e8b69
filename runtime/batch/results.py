"""The file of a batch's results: every line is appended at once, so that a run can be killed and go on.

A line that was cut off by a kill is removed when the file is opened again; what stands there whole is done.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from quartet.runtime.batch.lines import BadLine, Entry, Request
from quartet.runtime.errors import UsageError


class Results:
    """The results so far. One process at a time may have the file."""

    def __init__(self, path: Path, reserve: Callable[[int], None] = lambda size: None) -> None:
        """Open or make it, for the user alone. Raises UsageError where another process has it, or it holds else.

        `reserve` is told how many bytes the file is about to have, and raises where it must not have so many.
        """
        self._path = path
        self._reserve = reserve
        self._ids: dict[str, str] = {}  # custom_id of a request that is done → the id of its result
        self._lines: set[int] = set()  # numbers of lines that are wrong
        self.succeeded = 0
        self.failed = 0
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.size = self._read()
        except BlockingIOError:
            os.close(self._file)
            raise UsageError(f"another process writes to {path}") from None
        except BaseException:
            os.close(self._file)
            raise

    @property
    def count(self) -> int:
        return self.succeeded + self.failed

    def has(self, line: Request | BadLine) -> bool:
        """Whether there is a result for this line."""
        if isinstance(line, BadLine):
            return line.failure.line in self._lines
        return line.custom_id in self._ids

    @property
    def custom_ids(self) -> Iterator[str]:
        """Of the requests that are done."""
        return iter(self._ids)

    def is_of_another(self, request: Request) -> bool:
        """Whether the result for this custom_id is one of a request that asks for something else."""
        return self._ids.get(request.custom_id, request.result_id) != request.result_id

    def add(self, entry: Entry) -> None:
        """Append a result. Raises OSError, and what `reserve` raises; a part that was written is taken back."""
        text = msgspec.json.encode(entry) + b"\n"
        with self._lock:
            if self._file < 0:
                return
            self._reserve(self.size + len(text))
            written = os.write(self._file, text)
            if written < len(text):  # the disk is full
                os.ftruncate(self._file, self.size)
                raise OSError(28, "No space left on device", str(self._path))
            self.size += len(text)
            self._note(entry)

    def close(self) -> None:
        """Have everything on the disk."""
        with self._lock:
            if self._file >= 0:
                with contextlib.suppress(OSError):  # not every file can be synchronized
                    os.fsync(self._file)
                os.close(self._file)
                self._file = -1

    def _read(self) -> int:
        """Take note of what is there, and cut off what is not whole. Returns the bytes that stay."""
        size = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    os.ftruncate(self._file, size)
                    break
                try:
                    self._note(msgspec.json.decode(text, type=Entry))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise UsageError(f"{self._path}, line {number}, is no result of a batch: {error}") from error
                size += len(text)
        return size

    def _note(self, entry: Entry) -> None:
        if entry.error is not None and entry.error.line is not None:
            self._lines.add(entry.error.line)
        elif entry.custom_id is not None:
            self._ids[entry.custom_id] = entry.id
        if entry.succeeded:
            self.succeeded += 1
        else:
            self.failed += 1
