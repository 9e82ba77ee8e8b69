"""A server that a chat starts for itself: its progress is shown, its log is kept in a file until all has gone well."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from quartet.runtime.client.arguments import KEY_VARIABLE
from quartet.runtime.client.connection import ClientError

SERVED = re.compile(rb"is served at (https?://\S+)\. Try:")
STAMP = re.compile(r"^\[[^\]]*\] ")
REASON = "quartet: "  # begins the line in which a launcher says why it ends
POLL_S = 0.1
STOP_S = 15.0


class StartedServer:
    """A server in a process group of its own, so that Ctrl-C at the terminal does not reach it."""

    def __init__(self, model: str, flags: Sequence[str] = (), api_key: str | None = None) -> None:
        descriptor, name = tempfile.mkstemp(prefix="quartet-chat-", suffix=".log")
        self.log = Path(name)
        self.url = ""
        self._failed = False
        command = [sys.executable, "-m", "quartet.launch_server", "--model-path", model, "--port", "0"]
        with os.fdopen(descriptor, "wb") as log:
            self._process = subprocess.Popen(
                [*command, "--exit-with-parent", str(os.getpid()), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ({KEY_VARIABLE: api_key} if api_key else {}),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, progress: Callable[[str], None]) -> None:
        """Wait until it serves and `url` is known; tell each new line of its log. Raises ClientError."""
        while True:
            ended = not self.alive  # asked first, so that its last lines are in the log
            written = self.log.read_bytes()
            if found := SERVED.search(written):
                self.url = found[1].decode()
                return
            line = last_line(written)
            if ended:
                self._failed = True
                reason = line.removeprefix(REASON) or f"it ended with status {self._process.returncode}"
                raise ClientError(f"the server did not start: {reason} (its log: {self.log})")
            progress(line)
            time.sleep(POLL_S)

    def explain(self, error: ClientError) -> ClientError:
        """The error, or that the server has ended where that is why."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(POLL_S)
        if self.alive:
            return error
        self._failed = True
        line = last_line(self.log.read_bytes())
        status = f"it ended with status {self._process.returncode}"
        reason = line.removeprefix(REASON) if line.startswith(REASON) else status
        return ClientError(f"the server has ended: {reason} (its log: {self.log})")

    def stop(self) -> None:
        """End it, and drop its log unless it is needed to see what failed."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if not self._failed:
            self.log.unlink(missing_ok=True)


@contextlib.contextmanager
def started(
    model: str, flags: Sequence[str], api_key: str | None, progress: Callable[[str], None]
) -> Iterator[StartedServer]:
    """A server that is ready, stopped at the end. Raises ClientError."""
    server = StartedServer(model, flags, api_key)
    try:
        server.wait_ready(progress)
        yield server
    finally:
        server.stop()


def last_line(written: bytes) -> str:
    """The last line of a log without its time; bars of progress write over their line."""
    lines = [line.strip() for line in re.split(r"[\r\n]", written[-4096:].decode(errors="replace"))]
    return next((STAMP.sub("", line) for line in reversed(lines) if line), "")
