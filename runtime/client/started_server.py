"""A server that a chat starts for itself: its progress is shown, its log is kept in a file until all has gone well."""

import contextlib
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from quartet.runtime.api.server import Server, reason
from quartet.runtime.client.connection import ClientError
from quartet.runtime.errors import StartupError, UsageError
from quartet.runtime.settings.flags import is_flag

STAMP = re.compile(r"^\[[^\]]*\] ")
POLL_S = 0.1
ENDS_WITHIN = 5  # polls
LAST_BYTES = 16 << 10


class StartedServer:
    """A server, and the file of its log."""

    def __init__(self, model: str, words: Sequence[str] = (), api_key: str | None = None) -> None:
        """Start it; `words` are flags as they stand on a command line. Raises UsageError, ClientError."""
        flags = flags_of(words)
        descriptor, name = tempfile.mkstemp(prefix="quartet-chat-", suffix=".log")
        os.close(descriptor)
        self.log = Path(name)
        self._failed = False
        try:
            self._server = Server(model, flags | {"api_key": api_key}, self.log)
        except StartupError as error:
            raise ClientError(str(error)) from error

    @property
    def alive(self) -> bool:
        return self._server.alive

    @property
    def url(self) -> str:
        """Its address, once it is ready. Raises UsageError where it has no port."""
        try:
            return self._server.url
        except RuntimeError as error:
            raise UsageError(f"a chat needs a port: {error}") from error

    def wait_ready(self, progress: Callable[[str], None]) -> None:
        """Wait until it serves; tell the last line of its log meanwhile. Raises ClientError."""
        while True:
            ended = not self.alive  # asked first: what it raises then is why
            try:
                self._server.wait_ready(POLL_S)
                return
            except StartupError as error:
                if ended:
                    self._failed = True
                    raise ClientError(f"the server did not start: {error} (its log: {self.log})") from error
            progress(last_line(self._written()))

    def explain(self, error: ClientError) -> ClientError:
        """The error, or that the server has ended where that is why."""
        for _ in range(ENDS_WITHIN):  # its connections break a moment before it has ended
            if self.alive:
                time.sleep(POLL_S)
        if self.alive:
            return error
        self._failed = True
        why = reason(self._written().decode(errors="replace")) or "it said no reason"
        return ClientError(f"the server has ended: {why} (its log: {self.log})")

    def stop(self) -> None:
        """End it, and drop its log unless it is needed to see what failed."""
        self._server.stop()
        if not self._failed:
            self.log.unlink(missing_ok=True)

    def _written(self) -> bytes:
        """The end of its log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - LAST_BYTES))
            return log.read()


@contextlib.contextmanager
def started(
    model: str, words: Sequence[str], api_key: str | None, progress: Callable[[str], None]
) -> Iterator[StartedServer]:
    """A server that is ready, stopped at the end. Raises UsageError, ClientError."""
    server = StartedServer(model, words, api_key)
    try:
        server.wait_ready(progress)
        yield server
    finally:
        server.stop()


def flags_of(words: Sequence[str]) -> dict[str, str]:
    """Flags of a command line by name; a flag without a value is "true". Raises UsageError for what is no flag."""
    flags: dict[str, str] = {}
    left = deque(words)
    while left:
        word = left.popleft()
        if not word.startswith("--"):
            raise UsageError(f"unexpected argument {word!r}; behind -- stand flags of the server, as --dtype float32")
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            value = left.popleft() if left and not is_flag(left[0]) else "true"
        flags[name.replace("-", "_")] = value
    return flags


def last_line(written: bytes) -> str:
    """The last line of a log without its time; bars of progress write over their line."""
    lines = [line.strip() for line in re.split(r"[\r\n]", written.decode(errors="replace"))]
    return next((STAMP.sub("", line) for line in reversed(lines) if line), "")
