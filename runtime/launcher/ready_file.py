"""The file of --ready-file: it is there while the server serves, and says where, one address a line.

`http://127.0.0.1:41234` or `https://…` for TCP, `unix:/path` for a Unix socket. It appears whole, so whoever waits for
it may read it as soon as it is there.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from quartet.runtime.errors import StartupError

SCHEMES = (b"http://", b"https://", b"unix:")
MAX_BYTES = 1 << 16


class ReadyFile:
    """The file of one server; None: no file."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path).absolute()

    def write(self, addresses: Sequence[str]) -> None:
        """Say that the server serves there. Raises OSError."""
        if self._path is None:
            return
        hidden = self._hidden(self._path)
        try:
            hidden.write_text("".join(f"{address}\n" for address in addresses))
            hidden.replace(self._path)
        finally:
            hidden.unlink(missing_ok=True)

    def remove(self) -> None:
        """The server takes no requests any more."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                if is_ours(self._path):
                    self._path.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Remove the file of a server that has died. Raises StartupError where none could be written later."""
        if self._path is None:
            return
        try:
            if self._path.exists() and not is_ours(self._path):
                raise OSError(0, "something stands there that no server has written")
            hidden = self._hidden(self._path)
            hidden.touch()
            hidden.unlink()
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise StartupError(f"cannot write --ready-file {self._path}: {error.strerror}") from error

    def _hidden(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{os.getpid()}")


def is_ours(path: Path) -> bool:
    """Whether a path leads to a file that a server has written. Raises OSError."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return all(line.startswith(SCHEMES) for line in file.read(MAX_BYTES).splitlines())


@contextlib.contextmanager
def kept(path: str | None) -> Iterator[ReadyFile]:
    """A ready file that is gone at the end. Raises StartupError."""
    file = ReadyFile(path)
    file.prepare()
    try:
        yield file
    finally:
        file.remove()
