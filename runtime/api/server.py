"""`quartet.launch`: a server in processes of its own, started and stopped from Python.

The server ends with the process that started it, however that ends (`--exit-with-parent`). Nothing here needs the main
thread, a signal handler or an event loop, so it works in threads, in tests and in notebooks. torch is not imported.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import msgspec

from quartet.runtime.api.server_flags import ServerFlags
from quartet.runtime.errors import StartupError, UsageError
from quartet.runtime.launcher.run_dir import LOCK, SERVER_PREFIX, base, locked
from quartet.runtime.process.python_path import python_path
from quartet.runtime.settings.flags import dashed, forget_secrets, settings, spelled

POLL_S = 0.05
START_TIMEOUT_S = 600.0  # a large model is read from disk, or fetched before
STOP_TIMEOUT_S = 10.0  # for requests that still run
KILL_AFTER_S = 5.0  # after the second signal
AGAIN_S = 0.25  # between signals: a launcher takes two within 0.1 s for one
REASON = "quartet: "  # begins the last line of a launcher that has failed
WRONG_FLAGS = 2  # status of a launcher that has not begun
LAST_BYTES = 16 << 10  # of a log that are searched for it


class LogLine(msgspec.Struct):
    """What counts of a line of --log-format json."""

    logger: str = ""
    level: str = ""
    message: str = ""


class Server:
    """A running server. It ends with `stop`, with its `with` block, with the last reference to it, and with us."""

    def __init__(
        self, model: str, flags: Mapping[str, Any], log_path: str | Path | None = None, private: bool = False
    ) -> None:
        """Start the server's processes; they are not ready yet. Flags with the value None count as not given.

        `private`: it listens on no port, but on a socket (`socket_path`) that only this user can reach.
        """
        try:
            self._directory, self._lock = locked(base(os.environ), SERVER_PREFIX)
        except OSError as error:
            raise StartupError(f"the server cannot be started: {error}; set XDG_RUNTIME_DIR") from error
        self.socket_path = self._directory / "socket"
        given: dict[str, Any] = {
            "port": 0,
            "exit_with_parent": os.getpid(),
            "ready_file": str(self._directory / "ready"),
        }
        given |= {name: value for name, value in flags.items() if value is not None}
        given |= {"uds": str(self.socket_path), "disable_tcp": True} if private else {}
        self._ready_file = Path(given["ready_file"]).absolute()
        self.log_path = Path(log_path).absolute() if log_path else self._directory / "server.log"
        self._addresses: list[str] = []
        self._owner = os.getpid()
        self._stopping = threading.Lock()
        try:
            with open(self.log_path, "wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "quartet.launch_server", *arguments(model, given)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(os.environ, given, without_keys=private),
                    process_group=0,  # Ctrl-C at a terminal, or in a notebook, is for the program alone
                )
        except (OSError, ValueError) as error:  # ValueError: a model or flag with a character that no argument can have
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(self._lock)
            raise StartupError(f"the server cannot be started: {error}") from error
        self._left_over = weakref.finalize(self, abandon, self._process, self._directory, self._lock, os.getpid())

    @property
    def pid(self) -> int:
        """Of the launcher, which all other processes of the server end with."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def url(self) -> str:
        """Where the server is reached over TCP. Raises RuntimeError before `wait_ready`, and without a port."""
        if not self._addresses:
            raise RuntimeError("the address is known when the server is ready: call wait_ready() first")
        if self._addresses[0].startswith("unix:"):
            raise RuntimeError(f"the server listens on no port, only on {self._addresses[0]}")
        return self._addresses[0]

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Block until the server serves. Raises StartupError with the server's own reason where it does not."""
        due = time.monotonic() + timeout_s
        while not self._addresses:
            ended = not self.alive  # asked first, so that nothing comes after its last words are read
            if self._ready_file.exists():
                self._addresses = self._ready_file.read_text().splitlines()
            elif ended:
                raise self._failure()
            elif time.monotonic() >= due:
                raise StartupError(f"the server is not ready within {timeout_s:g} s; its log: {self.log_path}")
            else:
                time.sleep(POLL_S)
        return self

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """End the server; requests that still run get so many seconds. Returns its exit status; may be called again.

        In a process that was forked from the one that started it, it does nothing.
        """
        if os.getpid() != self._owner:
            return 0
        with self._stopping:
            self._signal(timeout_s)
            ends_at = time.monotonic() + KILL_AFTER_S
            while self.alive and time.monotonic() < ends_at:
                self._signal(AGAIN_S)  # the second one that it hears ends what runs
            if self.alive:
                self._process.kill()
            status = self._process.wait()
            if self._left_over.detach():
                remove(self._directory, self._lock)
            return status

    def _signal(self, patience_s: float) -> None:
        if self.alive:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)

    def explain(self) -> str:
        """Why nobody answers any more, in a line."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_AFTER_S)
        return f"the connection was lost; the log: {self.log_path}" if self.alive else str(self._failure())

    def __enter__(self) -> Self:
        """The server once it serves. Raises StartupError, and then nothing runs any more."""
        try:
            return self.wait_ready()
        except BaseException:
            self.stop(0.0)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "has ended" if not self.alive else self._addresses[0] if self._addresses else "is starting"
        return f"<quartet server {self.pid}: {state}>"

    def _failure(self) -> StartupError:
        """Why it has ended, in its own words. The log is kept where it may tell more, and a note says where."""
        if not self.log_path.exists():
            return StartupError("the server has ended: it was stopped")
        written = self.log_path.read_bytes()[-LAST_BYTES:]
        status = self._process.returncode
        error = StartupError(reason(written.decode(errors="replace")) or f"the server ended with status {status}")
        if status != WRONG_FLAGS:
            if self.log_path.parent == self._directory and self._left_over.detach():
                (self._directory / LOCK).unlink(missing_ok=True)  # no sweep removes it then
                os.close(self._lock)
            error.add_note(f"The server's log: {self.log_path}")
        return error


def launch(model: str = "demo", *, log_path: str | Path | None = None, **flags: Unpack[ServerFlags]) -> Server:
    """Start a server on a free port: `with launch("demo") as server:` has `server.url` once the server is ready.

    Flags are those of `quartet serve` with underscores. Without `with`, call `wait_ready()` and `stop()`.
    `log_path`: where the server's log goes (default: a file that is removed unless the server fails).
    Raises StartupError, and TypeError for a name that is no flag.
    """
    check_names("launch", flags, ("model", "log_path"))
    return Server(model, flags, log_path)


def check_names(function: str, given: Iterable[str], own: Collection[str]) -> None:
    """Raise TypeError for a keyword that is no flag of `quartet serve`. `own`: what else the function takes."""
    for name in given:
        try:
            spelled(f"--{dashed(name)}", ())
        except UsageError as error:
            near = get_close_matches(name, [*settings(), *own], n=1)
            hint = f"; did you mean {near[0]}?" if near else "; flags are those of `quartet serve --help-all`"
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}") from error


def arguments(model: str, flags: Mapping[str, Any]) -> list[str]:
    """The command line of a server; what is secret goes by the environment."""
    known = settings()
    words = [] if "model_path" in flags else [f"--model-path={model}"]
    for name, value in flags.items():
        if value is not None and not by_environment(known, name):
            words.append(f"--{name.replace('_', '-')}={as_words(value) if has_words(known, name) else as_text(value)}")
    return words


def environment(own: Mapping[str, str], flags: Mapping[str, Any], without_keys: bool = False) -> dict[str, str]:
    """The environment of a server: ours, with what is secret in its flags; keys of another server are left out."""
    known = settings()
    own = dict(own)
    if without_keys:
        forget_secrets(own)
    secrets = {
        known[name].flag.variable: as_text(value)
        for name, value in flags.items()
        if value is not None and by_environment(known, name)
    }
    inherited = {name: value for name, value in own.items() if name != "NOTIFY_SOCKET"}  # it is not our readiness
    return inherited | secrets | {"PYTHONPATH": python_path(own)}


def by_environment(known: Mapping[str, Any], name: str) -> bool:
    """Command lines are seen by every user of the machine."""
    return name in known and known[name].flag.secret and bool(known[name].flag.variable)


def has_words(known: Mapping[str, Any], name: str) -> bool:
    return name in known and known[name].flag.words


def as_words(value: object) -> str:
    """A list of words as JSON, so that none is taken for two."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def as_text(value: object) -> str:
    """A flag's value as it stands on a command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def reason(log: str) -> str:
    """The last line in which a launcher says why it ends; empty where there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith(REASON):
            return line.removeprefix(REASON)
        if line.startswith("{"):
            with contextlib.suppress(msgspec.DecodeError):
                said = msgspec.json.decode(line, type=LogLine)
                if (said.logger, said.level) == ("quartet", "error"):
                    return said.message
    return ""


def abandon(process: "subprocess.Popen[bytes]", directory: Path, lock: int, owner: int) -> None:
    """End a server that nobody refers to any more, or whose program ends; not from a process forked from that one."""
    if os.getpid() == owner:
        if process.poll() is None:
            process.terminate()
        remove(directory, lock)


def remove(directory: Path, lock: int) -> None:
    """Remove a server's directory and let its lock go."""
    shutil.rmtree(directory, ignore_errors=True)
    os.close(lock)
