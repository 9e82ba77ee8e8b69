"""Whole servers for tests: the real launcher in a process of its own, on a free port, with its log at hand."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
READY = "Ctrl-C stops it."  # last line of what the launcher prints when all services are ready
STAND_INS = {
    "gateway": "tests.stand_ins.gateway",
    "tokenizer": "tests.stand_ins.hop",
    "scheduler": "tests.stand_ins.hop",
    "detokenizer": "tests.stand_ins.hop",
}


class Server:
    """A launcher process and everything it prints."""

    def __init__(
        self,
        flags: tuple[str, ...],
        services: Mapping[str, str],
        environment: Mapping[str, str],
        run_base: Path,
        directory: Path = ROOT,
        before: tuple[str, ...] = (),
    ) -> None:
        self.run_base = run_base
        self._lines: list[str] = []
        self._more = threading.Condition()
        self._ended = False
        replaced = [f"{role}={module}" for role, module in services.items()]
        ours = {"XDG_RUNTIME_DIR": str(run_base), "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.launcher", *replaced, "--", "--port", "0", *flags],
            cwd=directory,
            env=os.environ | ours | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self._lines.append(line)
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    @property
    def log(self) -> str:
        """All lines so far, of the launcher and of the services."""
        with self._more:
            return "".join(self._lines)

    @property
    def url(self) -> str:
        found = re.search(r"is served at (http://\S+)\. Try:", self.log)
        assert found, self.log
        return found[1]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Block until the log has `text`; fail with the whole log when the server ends or time is up."""
        with self._more:
            seen = self._more.wait_for(lambda: self._ended or text in "".join(self._lines), timeout_s)
            assert seen, f"no {text!r} within {timeout_s} s:\n{''.join(self._lines)}"
            assert text in "".join(self._lines), f"the server ended before {text!r}:\n{''.join(self._lines)}"

    def wait_for_match(self, pattern: str, start: int = 0, timeout_s: float = 60) -> re.Match[str]:
        """Block until a line from the log's position `start` on matches; fail with what came since then."""
        line = re.compile(pattern, re.MULTILINE)
        with self._more:
            self._more.wait_for(lambda: self._ended or line.search("".join(self._lines), start), timeout_s)
            log = "".join(self._lines)
        found = line.search(log, start)
        assert found, f"no line like {pattern!r} within {timeout_s} s:\n{log[start:]}"
        return found

    def children(self) -> dict[str, psutil.Process]:
        """Role → process, of the services that run: a process that ends has no command line any more."""
        found = psutil.Process(self.process.pid).children()
        titles = {line[0]: process for process in found if (line := command_line(process))}
        return {title.removeprefix("quartet::"): process for title, process in titles.items()}

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30) -> int:
        """The launcher's exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launcher still runs after {timeout_s} s:\n{self.log}") from None

    def output(self, timeout_s: float = 30) -> str:
        """Everything it printed, once it and all its children have ended."""
        self.wait(timeout_s)
        with self._more:
            assert self._more.wait_for(lambda: self._ended, timeout_s), "a process outlived the launcher"
        return self.log


def command_line(process: psutil.Process) -> list[str]:
    """Empty for a process that has ended or is about to."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def started(module: str, boot_file: Path, *inherited: int) -> subprocess.Popen[bytes]:
    """One service by itself, as the launcher starts it."""
    process = subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, stdin=subprocess.PIPE, pass_fds=inherited)
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(f"{boot_file}\n".encode())
    return process


@contextlib.contextmanager
def launched(
    *flags: str,
    services: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    ready: bool = True,
    directory: Path = ROOT,
    standby: bool = False,
    before: tuple[str, ...] = (),
) -> Iterator[Server]:
    """A server started with these flags and, where named, other modules as services; stopped at the end.

    `ready`: wait until it serves. `directory`: where it starts, for relative paths in the flags. `standby`: keep a
    second scheduler process at hand, as servers do; it takes two seconds of a core that only tests of deaths need.
    `before`: a command that executes the launcher.
    The port is free and chosen by the kernel, see `Server.url`.
    """
    run_base = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))  # short: socket paths are limited
    settings = {} if standby else {"QUARTET_DISABLE_STANDBY": "1"}
    server = Server(flags, services or {}, settings | dict(environment or {}), run_base, directory, before)
    try:
        if ready:
            server.wait_for(READY)
        yield server
    finally:
        if server.process.poll() is None:
            server.signal(signal.SIGTERM)
            try:
                server.process.wait(10)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()
        shutil.rmtree(run_base, ignore_errors=True)
