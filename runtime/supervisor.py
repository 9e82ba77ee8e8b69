"""Starts the service processes, awaits their Ready lines, watches them, and ends them. Owns nothing but children.

One `poll` waits for everything that can happen: a signal, a Ready line, the end of a child (seen through its pidfd, so
at once), the time to start one again. What a death means is the service's `on_death`, a function of the supervisor and
the child: `start_again`, until the budget is spent, or `end_everything`. A scheduler that lives but does not move is
killed, which makes it a death like any other.
"""

import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType

import msgspec

from runtime.config import ServerConfig
from runtime.progress import ProgressReader
from runtime.service import Boot, Ready, arm_death_signal
from runtime.sockets import door, endpoint, turn_door

log = logging.getLogger(__name__)

SOURCE_ROOT = Path(__file__).resolve().parents[1]
DRAIN_GRACE_S = 5.0  # beyond the drain time-out, for the gateway to end by itself
READY_LINE_BYTES = 64 << 10
BUDGET_WINDOW_S = 60.0  # `max_restarts` deaths of a service within this time are forgiven
BACK_OFF_S = (0.0, 0.5, 2.0)  # before the first restart within the window, the second, all others
LOOK_EVERY_S = 0.5  # at the progress word
DUMP_GRACE_S = 1.0  # between the signal that has a hung process write its stacks and the one that kills it
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # in a container: "<microseconds or max> <period>"


class ExitStatus(IntEnum):
    """How the launcher ends."""

    CLEAN = 0  # stopped on request, after draining
    USAGE = 2  # wrong flag or config file
    STARTUP = 64  # the server could not start; one line says why
    DIED = 70  # a process died or did not drain in time
    INTERRUPTED = 130  # Ctrl-C before the processes were started
    FORCED = 143  # a second SIGTERM cut the draining short


def start_again(supervisor: "Supervisor", child: "Child") -> None:
    """What a death means: the service is started anew, unless the server was never up or it dies again and again."""
    last = child.service.listens and supervisor.draining_until is not None
    if last or not supervisor.was_ready:
        end_everything(supervisor, child)
        return
    allowed, recent = supervisor.config.max_restarts, supervisor.recent_deaths(child.role)
    if len(recent) >= allowed:
        end_everything(supervisor, child)
        return
    recent.append(time.monotonic())
    fate = child.error or child.fate
    log.error("The %s (pid %d) %s; starting it again (%d of %d).", *child.name, fate, len(recent), allowed)
    supervisor.replace(child, BACK_OFF_S[min(len(recent), len(BACK_OFF_S)) - 1])


def end_everything(supervisor: "Supervisor", child: "Child") -> None:
    """What a death means: the server ends, cleanly only if it was the gateway's, drained as asked."""
    if child.service.listens and supervisor.draining_until is not None and child.process.returncode == 0:
        supervisor.end(ExitStatus.CLEAN)
    elif supervisor.was_ready or child.ready:
        fate = child.error or child.fate
        supervisor.end(ExitStatus.DIED, "the {} (pid {}) {}; ending the server".format(*child.name, fate))
    elif child.error:
        supervisor.end(ExitStatus.STARTUP, child.error)
    else:
        supervisor.end(ExitStatus.STARTUP, f"the {child.role} {child.fate} while starting; its last lines are above")


@dataclass(frozen=True)
class Service:
    """One row of the table of processes. Each sends to the next row, the last to the first."""

    role: str
    module: str
    threads: int = 1  # OpenMP threads; 0: one per usable core
    listens: bool = False  # gets the bound HTTP socket
    environment: Mapping[str, str] = field(default_factory=dict)  # what the launcher's own does not set
    beats: bool = False  # writes the progress word while it is well
    on_death: Callable[["Supervisor", "Child"], None] = start_again


@dataclass
class Child:
    """One incarnation of a service."""

    service: Service
    process: subprocess.Popen[bytes]
    pidfd: int
    ready_fd: int  # our end of its ready pipe
    epoch: int = 0
    spawned_at: float = field(default_factory=time.monotonic)
    ready_at: float = 0.0
    hung_at: float = 0.0  # when it was told to write its stacks; 0: it is well
    ready: bool = False
    error: str = ""  # why it cannot start, in its own words
    silent: bool = False  # it has closed its ready pipe
    _line: bytearray = field(default_factory=bytearray)

    @property
    def role(self) -> str:
        return self.service.role

    @property
    def name(self) -> tuple[str, int]:
        """Role and process, for people."""
        return self.role, self.process.pid

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
            self.error, self.ready, self.ready_at = answer.error, not answer.error, time.monotonic()

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
        self.was_ready = False  # all services were, once
        self._progress = ProgressReader(str(run_dir))
        self._deaths: defaultdict[str, deque[float]] = defaultdict(deque)  # by role, within the window
        self._due: dict[str, tuple[float, int]] = {}  # by role: when to start it, and as which epoch

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def run(self, signals: Signals, on_ready: Callable[[], None], on_drain: Callable[[], None]) -> ExitStatus:
        """Start all services and stay until the end of the server; children may still run when this returns."""
        for service in self.services:
            self.children[service.role] = self.spawn(service)
        while self.status is None:
            self.wait(signals)
            self.look_at_children()
            if signals.count and self.draining_until is None:
                on_drain()
                self.drain()
            if self.draining_until is not None:
                self.look_at_drain(signals)
            elif self.ready and not self.was_ready:
                self.was_ready = True
                on_ready()
        return self.status

    def look_at_drain(self, signals: Signals) -> None:
        if signals.count > 1:
            self.end(ExitStatus.FORCED, "ended before the running requests were done")
        elif time.monotonic() >= (self.draining_until or 0.0):
            self.end(ExitStatus.DIED, "the gateway did not drain in time")

    @property
    def ready(self) -> bool:
        return not self._due and all(child.ready for child in self.children.values())

    def recent_deaths(self, role: str) -> "deque[float]":
        """When the last ones were, as far as they still count."""
        deaths = self._deaths[role]
        while deaths and deaths[0] < time.monotonic() - BUDGET_WINDOW_S:
            deaths.popleft()
        return deaths

    def replace(self, child: Child, delay_s: float) -> None:
        """Forget a dead child and start its service again after a while."""
        child.close()
        del self.children[child.role]
        for left in (f"{child.role}.{child.epoch}", f"{child.role}.{child.epoch}.boot"):
            (self.run_dir / left).unlink(missing_ok=True)
        self._due[child.role] = time.monotonic() + delay_s, child.epoch + 1

    def spawn_due(self) -> None:
        """Start again what has waited long enough."""
        for service in self.services:
            due_at, epoch = self._due.get(service.role, (float("inf"), 0))
            if time.monotonic() >= due_at:
                del self._due[service.role]
                self.children[service.role] = self.spawn(service, epoch)

    def spawn(self, service: Service, epoch: int = 0) -> Child:
        """Start one incarnation of a service. Call from the main thread: its death signal is tied to this thread."""
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ready_read, False)
        boot = self.boot(service, epoch, ready_write)
        boot_file = self.run_dir / f"{service.role}.{epoch}.boot"
        boot_file.write_bytes(msgspec.msgpack.encode(boot))
        turn_door(str(self.run_dir), service.role, epoch)
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
        return Child(service, process, os.pidfd_open(process.pid), ready_read, epoch)

    def boot(self, service: Service, epoch: int, ready_fd: int) -> Boot:
        run_dir = str(self.run_dir)
        following = self.services[(self.services.index(service) + 1) % len(self.services)]
        return Boot(
            role=service.role,
            epoch=epoch,
            run_dir=run_dir,
            inbox=endpoint(run_dir, service.role, epoch),
            outbox=door(run_dir, following.role),
            config=self.config,
            ready_fd=ready_fd,
            lifeline_fd=self.lifeline_fd,
            parent_pid=os.getpid(),
            listen_fd=self.listen_fd if service.listens else -1,
        )

    def wait(self, signals: Signals) -> None:
        """Block until a signal, a Ready line, the end of a child, or the time for something."""
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        for child in self.children.values():
            poll.register(child.pidfd, select.POLLIN)
            if not child.ready and not child.silent:
                poll.register(child.ready_fd, select.POLLIN)
        times = [due_at for due_at, _ in self._due.values()]
        if self.draining_until is not None:
            times.append(self.draining_until)
        if (
            any(child.service.beats and child.ready for child in self.children.values())
            and self.config.watchdog_timeout
        ):
            times.append(time.monotonic() + LOOK_EVERY_S)
        timeout_ms = max(0.0, min(times) - time.monotonic()) * 1000 if times else None
        happened = poll.poll(timeout_ms)
        if any(fd == signals.fileno() for fd, _ in happened):
            signals.drain()

    def look_at_children(self) -> None:
        for child in self.children.values():
            if not child.ready:
                child.read_ready()
                if child.ready and child.epoch:
                    log.info(
                        "The %s serves again (pid %d, after %.1f s).", *child.name, child.ready_at - child.spawned_at
                    )
        for child in list(self.children.values()):
            if child.exited and self.status is None:
                child.read_ready()  # its last words may have come after the first look
                child.service.on_death(self, child)
            elif child.service.beats and child.ready:
                self.look_at_progress(child)
        self.spawn_due()

    def look_at_progress(self, child: Child) -> None:
        """Kill a child that has not moved for too long; its stacks are written first."""
        now, timeout_s = time.monotonic(), self.config.watchdog_timeout
        if child.hung_at:
            if now - child.hung_at > DUMP_GRACE_S:
                child.process.kill()
        elif timeout_s and min(self._progress.age_s(), now - child.ready_at) > timeout_s:
            log.error(
                "The %s (pid %d) has not moved for %.0f s (--watchdog-timeout); killing it.", *child.name, timeout_s
            )
            child.hung_at = now
            child.process.send_signal(signal.SIGABRT)

    def end(self, status: ExitStatus, reason: str = "") -> None:
        """Decide the end; the first decision stands."""
        if self.status is None:
            self.status, self.reason = status, reason

    def drain(self) -> None:
        """Ask the gateway to finish what runs; before the server is ready there is nothing to finish."""
        if not (self.was_ready and any(child.service.listens and child.ready for child in self.children.values())):
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
