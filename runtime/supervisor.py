"""Starts the service processes, awaits their Ready lines, watches them, and ends them. Owns nothing but children.

Deaths are seen through pidfds, so nothing is polled. One `poll` waits for everything that can happen: a signal, a
Ready line, the end of a child. What a death means is the service's `on_death`, a function of the supervisor and the
child; `end_everything` is the only one so far.
"""

import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType

import msgspec

from runtime.config import ServerConfig
from runtime.service import Boot, Ready, arm_death_signal
from runtime.sockets import endpoint

log = logging.getLogger(__name__)

SOURCE_ROOT = Path(__file__).resolve().parents[1]
DRAIN_GRACE_S = 5.0  # beyond the drain time-out, for the gateway to end by itself
READY_LINE_BYTES = 64 << 10
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # in a container: "<microseconds or max> <period>"


class ExitStatus(IntEnum):
    """How the launcher ends."""

    CLEAN = 0  # stopped on request, after draining
    USAGE = 2  # wrong flag or config file
    STARTUP = 64  # the server could not start; one line says why
    DIED = 70  # a process died or did not drain in time
    INTERRUPTED = 130  # Ctrl-C before the processes were started
    FORCED = 143  # a second SIGTERM cut the draining short


def end_everything(supervisor: "Supervisor", child: "Child") -> None:
    """What a death means: the server ends, cleanly only if it was the gateway's, drained as asked."""
    if child.service.listens and supervisor.draining_until is not None and child.process.returncode == 0:
        supervisor.end(ExitStatus.CLEAN)
    elif child.error:
        supervisor.end(ExitStatus.STARTUP, child.error)
    elif not child.ready:
        supervisor.end(ExitStatus.STARTUP, f"the {child.role} {child.fate} while starting; its last lines are above")
    else:
        supervisor.end(ExitStatus.DIED, f"the {child.role} (pid {child.process.pid}) {child.fate}; ending the server")


@dataclass(frozen=True)
class Service:
    """One row of the table of processes. Each sends to the next row, the last to the first."""

    role: str
    module: str
    threads: int = 1  # OpenMP threads; 0: one per usable core
    listens: bool = False  # gets the bound HTTP socket
    environment: Mapping[str, str] = field(default_factory=dict)  # what the launcher's own does not set
    on_death: Callable[["Supervisor", "Child"], None] = end_everything


@dataclass
class Child:
    """One incarnation of a service."""

    service: Service
    process: subprocess.Popen[bytes]
    pidfd: int
    ready_fd: int  # our end of its ready pipe
    ready: bool = False
    error: str = ""  # why it cannot start, in its own words
    silent: bool = False  # it has closed its ready pipe
    _line: bytearray = field(default_factory=bytearray)

    @property
    def role(self) -> str:
        return self.service.role

    @property
    def exited(self) -> bool:
        return self.process.poll() is not None

    @property
    def fate(self) -> str:
        """How it ended, for people."""
        status = self.process.returncode
        if status is None:
            return "still runs"
        if status >= 0:
            return f"ended with status {status}"
        name = signal.Signals(-status).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

    def read_ready(self) -> None:
        """Take what is in the ready pipe; a complete line sets `ready` or `error`."""
        try:
            piece = os.read(self.ready_fd, READY_LINE_BYTES)
        except BlockingIOError:
            return
        self.silent = not piece
        self._line += piece
        if self._line.endswith(b"\n") and not self.ready:
            answer = msgspec.json.decode(bytes(self._line), type=Ready)
            self.error, self.ready = answer.error, not answer.error

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.ready_fd)


class Signals:
    """SIGTERM and SIGINT as a count and a file descriptor to poll."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)
    SAME_S = 0.1  # timeout(1) signals a process and then its group: that is one request to stop, not two

    def __init__(self) -> None:
        self.count = 0
        self._last_at = float("-inf")
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> "Signals":
        self._old_wakeup_fd = signal.set_wakeup_fd(self._write_fd)
        self._old = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup_fd)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def fileno(self) -> int:
        return self._read_fd

    def drain(self) -> None:
        os.read(self._read_fd, 4096)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.count += now - self._last_at >= self.SAME_S
        self._last_at = now


class Supervisor:
    """The children of one server, from spawn to the last exit."""

    def __init__(
        self, services: Sequence[Service], config: ServerConfig, run_dir: Path, lifeline_fd: int, listen_fd: int
    ) -> None:
        self.services = services
        self.config = config
        self.run_dir = run_dir
        self.lifeline_fd = lifeline_fd
        self.listen_fd = listen_fd
        self.children: dict[str, Child] = {}
        self.status: ExitStatus | None = None  # set when the end is decided
        self.reason = ""  # the line that explains a status other than CLEAN
        self.draining_until: float | None = None

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def run(self, signals: Signals, on_ready: Callable[[], None], on_drain: Callable[[], None]) -> ExitStatus:
        """Start all services and stay until the end of the server; children may still run when this returns."""
        for service in self.services:
            self.children[service.role] = self.spawn(service)
        announced = False
        while self.status is None:
            self.wait(signals)
            self.look_at_children()
            if signals.count and self.draining_until is None:
                on_drain()
                self.drain()
            if self.draining_until is not None:
                self.look_at_drain(signals)
            elif self.ready and not announced:
                announced = True
                on_ready()
        return self.status

    def look_at_drain(self, signals: Signals) -> None:
        if signals.count > 1:
            self.end(ExitStatus.FORCED, "ended before the running requests were done")
        elif time.monotonic() >= (self.draining_until or 0.0):
            self.end(ExitStatus.DIED, "the gateway did not drain in time")

    @property
    def ready(self) -> bool:
        return all(child.ready for child in self.children.values())

    def spawn(self, service: Service, epoch: int = 0) -> Child:
        """Start one incarnation of a service. Call from the main thread: its death signal is tied to this thread."""
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ready_read, False)
        boot = self.boot(service, epoch, ready_write)
        boot_file = self.run_dir / f"{service.role}.{epoch}.boot"
        boot_file.write_bytes(msgspec.msgpack.encode(boot))
        inherited = [fd for fd in (ready_write, self.lifeline_fd, boot.listen_fd) if fd >= 0]
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", service.module, str(boot_file)],
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                env=child_environment(os.environ, service),
                process_group=0,  # Ctrl-C reaches the launcher alone; it decides
                preexec_fn=partial(arm_death_signal, os.getpid()),  # an interpreter that still starts dies as well
            )
        finally:
            os.close(ready_write)
        return Child(service, process, os.pidfd_open(process.pid), ready_read)

    def boot(self, service: Service, epoch: int, ready_fd: int) -> Boot:
        run_dir = str(self.run_dir)
        following = self.services[(self.services.index(service) + 1) % len(self.services)]
        return Boot(
            role=service.role,
            epoch=epoch,
            run_dir=run_dir,
            inbox=endpoint(run_dir, service.role, epoch),
            outbox=endpoint(run_dir, following.role, 0),
            config=self.config,
            ready_fd=ready_fd,
            lifeline_fd=self.lifeline_fd,
            parent_pid=os.getpid(),
            listen_fd=self.listen_fd if service.listens else -1,
        )

    def wait(self, signals: Signals) -> None:
        """Block until a signal, a Ready line, the end of a child, or the drain deadline."""
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        for child in self.children.values():
            poll.register(child.pidfd, select.POLLIN)
            if not child.ready and not child.silent:
                poll.register(child.ready_fd, select.POLLIN)
        timeout_s = None if self.draining_until is None else max(0.0, self.draining_until - time.monotonic())
        happened = poll.poll(None if timeout_s is None else timeout_s * 1000)
        if any(fd == signals.fileno() for fd, _ in happened):
            signals.drain()

    def look_at_children(self) -> None:
        for child in self.children.values():
            if not child.ready:
                child.read_ready()
        for child in list(self.children.values()):
            if child.exited and self.status is None:
                child.read_ready()  # its last words may have come after the first look
                child.service.on_death(self, child)

    def end(self, status: ExitStatus, reason: str = "") -> None:
        """Decide the end; the first decision stands."""
        if self.status is None:
            self.status, self.reason = status, reason

    def drain(self) -> None:
        """Ask the gateway to finish what runs; before the server is ready there is nothing to finish."""
        if not self.ready:
            self.end(ExitStatus.CLEAN)
            return
        self.draining_until = time.monotonic() + self.config.drain_timeout + DRAIN_GRACE_S
        for child in self.children.values():
            if child.service.listens:
                child.process.terminate()

    def stop(self) -> None:
        """Kill all children. The gateway has drained by now or will not; nothing in the others is worth saving."""
        for child in self.children.values():
            child.process.kill()
        for child in self.children.values():
            child.process.wait()
            child.close()
        self.children.clear()


def child_environment(environment: Mapping[str, str], service: Service) -> dict[str, str]:
    """The launcher's environment over the service's; quiet OpenMP threads; a path on which our packages come first."""
    path = [str(SOURCE_ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve the other processes
        "OMP_NUM_THREADS": str(service.threads or usable_cores(CPU_QUOTA)),
        **service.environment,
    }
    inherited = {name: value for name, value in environment.items() if name != "NOTIFY_SOCKET"}
    return ours | inherited | {"PYTHONPATH": os.pathsep.join(path)}


def usable_cores(quota_file: Path) -> int:
    """Cores that this process may run on, and that its control group pays for."""
    cores = len(os.sched_getaffinity(0))
    if not quota_file.is_file():
        return cores
    quota, period = quota_file.read_text().split()
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
