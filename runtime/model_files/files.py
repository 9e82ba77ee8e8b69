"""Files of a model directory, which anybody may have made: only regular ones are opened, small ones read whole.

A pipe would wait for its writer, a device never ends, a directory has no bytes; all are an OSError here that says so.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from quartet.runtime.errors import StartupError

MAX_SETTINGS_BYTES = 8 << 20  # config.json and its like
MAX_TOKENIZER_BYTES = 256 << 20  # tokenizer.json
MAX_TEMPLATE_BYTES = 1 << 20


def open_regular(path: Path) -> int:
    """A descriptor for reading. Raises OSError for what cannot be read or is no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """The same, closed at the end."""
    descriptor = open_regular(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def expanded(name: str) -> Path:
    """A path whose ~ or ~user stands for that home directory. Raises StartupError where there is none."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise StartupError(f"{name}: there is no home directory of that name") from error


def present(path: Path) -> bool:
    """Whether there is anything of this name, even what cannot be read."""
    return os.path.lexists(path)


def read_small(path: Path, max_bytes: int) -> bytes:
    """A file's bytes. Raises StartupError for what cannot be read, is no regular file or is too large."""
    try:
        with opened(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise StartupError(f"{path} is larger than {max_bytes} bytes")
    return data


def read_small_text(path: Path, max_bytes: int) -> str:
    """A file's text. Raises StartupError as `read_small`, and for what is no UTF-8."""
    try:
        return read_small(path, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise StartupError(f"{path} is not valid UTF-8: {error}") from error
