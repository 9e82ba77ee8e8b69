"""One process of the server: how it is started, what it says of itself, how it ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from quartet.runtime.errors import StartupError
from quartet.runtime.messages import process_key, title_of
from quartet.runtime.process import control_group, vitals
from quartet.runtime.process.control_group import Directory
from quartet.runtime.process.parent_death import arm_death_signal
from quartet.runtime.process.python_path import python_path
from quartet.runtime.service import Ready

READY_LINE_BYTES = 64 << 10
STANDBY = "quartet.runtime.standby"
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")  # variables by which OpenMP binds threads to CPUs


@dataclass(frozen=True)
class Service:
    """One row of the table of processes. Each sends to the next row, the last to the first."""

    role: str
    module: str
    threads: int = 1  # OpenMP threads; 0: one per usable core
    listens: bool = False  # gets the bound HTTP socket
    environment: Mapping[str, str] = field(default_factory=dict)  # what the launcher's own does not set
    standby: bool = False  # a second process has its modules imported, so that a restart is quick
    rank: int = 0  # among the processes of its role
    of_role: int = 1  # how many processes the role has

    @property
    def key(self) -> str:
        """Names this process among all of the server: its files in the run directory begin with it."""
        return process_key(self.role, self.rank)


@dataclass
class Child:
    """One incarnation of a service. Until it is given its boot file it stands by, with its modules imported."""

    service: Service
    process: subprocess.Popen[bytes]
    pidfd: int
    ready_fd: int  # our end of its ready pipe
    their_ready_fd: int  # the number of the other end, inside the process
    epoch: int = 0
    booted_at: float = 0.0
    ready_at: float = 0.0
    hung_at: float = 0.0  # when it was signalled to write its stacks; 0: it is not hung
    ready: bool = False
    error: str = ""  # why it cannot start, in its own words
    silent: bool = False  # it has closed its ready pipe
    _line: bytearray = field(default_factory=bytearray)

    @property
    def role(self) -> str:
        return self.service.role

    @property
    def key(self) -> str:
        return self.service.key

    @property
    def name(self) -> tuple[str, int]:
        """Role and process, for people."""
        return title_of(self.service.role, self.service.rank, self.service.of_role), self.process.pid

    @property
    def exited(self) -> bool:
        return self.process.poll() is not None

    @property
    def can_start(self) -> bool:
        """Whether one that stands by is there, and not stopped by somebody."""
        found = vitals.read_vitals(self.process.pid)
        return not self.exited and (found is None or found.state is not vitals.State.STOPPED)

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

    def give(self, boot_file: Path, epoch: int) -> None:
        """Tell it what it is. If it has died meanwhile, its pidfd says so."""
        self.epoch, self.booted_at = epoch, time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{boot_file}\n".encode())
            self.process.stdin.close()

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
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


def start(service: Service, inherited: Sequence[int], standby: bool = False) -> Child:
    """Start a process that imports the service's modules and then waits for its boot file.

    `inherited`: descriptors that it keeps. `standby`: the file may be long in coming, and its imports give way to
    others. Call from the main thread: its death signal is tied to this thread.
    """
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(ready_read, False)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *([STANDBY] if standby else []), service.module],
            stdin=subprocess.PIPE,
            pass_fds=[ready_write, *inherited],
            env=child_environment(os.environ, service),
            process_group=0,  # Ctrl-C reaches the launcher alone; it decides
            preexec_fn=partial(arm_death_signal, os.getpid()),  # an interpreter that still starts dies as well
        )
    except OSError:
        os.close(ready_read)
        raise
    finally:
        os.close(ready_write)
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:  # nobody would see its end
        process.kill()
        process.communicate()
        os.close(ready_read)
        raise
    return Child(service, process, pidfd, ready_read, ready_write)


def child_environment(environment: Mapping[str, str], service: Service) -> dict[str, str]:
    """The launcher's environment over the service's; quiet OpenMP threads; a path on which our packages come first.

    OpenMP binds nothing: it would leave the thread that loads it one CPU, and so all that this thread starts: our own
    kernels' threads, and the compiler.
    """
    ours = {
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve the other processes
        "OMP_NUM_THREADS": str(service.threads or max(1, usable_cores() // service.of_role)),
        **service.environment,
    }
    inherited = {name: value for name, value in environment.items() if name != "NOTIFY_SOCKET"}
    return ours | inherited | {"PYTHONPATH": python_path(environment), "OMP_PROC_BIND": "FALSE"}


def binding_note(environment: Mapping[str, str]) -> str:
    """What to tell an operator who wants OpenMP to bind threads; "" where nobody does."""
    if environment.get("OMP_PROC_BIND", "").strip().lower() == "false":
        return ""
    found = [name for name in BINDING if environment.get(name)]
    if not found:
        return ""
    return f"{' and '.join(found)} not used: the kernels place their threads. `taskset` chooses the server's CPUs."


def device_numbers(service: Service, environment: Mapping[str, str], ranks: int = 1) -> str:
    """The GPUs of one process among several of its role, as CUDA_VISIBLE_DEVICES has them; "": what is visible already.

    `ranks` (--tp-size): how many each needs. Raises StartupError where fewer are visible than all need.
    """
    if service.of_role == 1:
        return ""
    first, needed = service.rank * ranks, service.of_role * ranks
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return ",".join(map(str, range(first, first + ranks)))
    numbers = [number.strip() for number in visible.split(",") if number.strip()]
    if len(numbers) < needed:
        each = f" with --tp-size {ranks}" if ranks > 1 else ""
        raise StartupError(
            f"--dp-size {service.of_role}{each} needs {needed} GPUs, and CUDA_VISIBLE_DEVICES names {len(numbers)}; "
            "make more visible, or take a smaller --dp-size"
        )
    return ",".join(numbers[first : first + ranks])


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on, and that its control groups pay for."""
    cores = [len(os.sched_getaffinity(0))]
    for group in control_group.directories("cpu", root):
        quota, period = cpu_time(group)
        if quota is not None and period:
            cores.append(max(1, round(quota / period)))
    return min(cores)


def cpu_time(group: Directory) -> tuple[int | None, int | None]:
    """Microseconds of CPU time that a group gets within so many."""
    if group.version == 1:
        return group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    words = group.words("cpu.max")  # "<microseconds or max> <period>"
    return (int(words[0]), int(words[1])) if len(words) == 2 and all(map(str.isdigit, words)) else (None, None)
