"""Starts the service processes, awaits their Ready lines, watches them, and ends them. Owns nothing but children.

One `poll` waits for everything that can happen: a signal, a Ready line, the end of a child (seen through its pidfd, so
at once), the time to start one again. A service that dies is started again until its budget is spent, as the next
epoch; where importing its modules takes long, a process that has done so stands by. A service that lives but does not
move is killed, which makes it a death like any other.
"""

import logging
import os
import select
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType

import msgspec

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.launcher.child import Child, Service, device_numbers, start
from quartet.runtime.launcher.lull import LOOK_EVERY_S as LOOK_FOR_LULL_S
from quartet.runtime.launcher.lull import Lull
from quartet.runtime.launcher.watchdog import Watchdog
from quartet.runtime.process import vitals
from quartet.runtime.process.memory import in_words, look
from quartet.runtime.process.progress import ProgressReader
from quartet.runtime.process.vitals import LOOK_EVERY_S, StopTimer
from quartet.runtime.service import Boot
from quartet.runtime.settings import keys
from quartet.runtime.sockets import endpoint, point_stable_path, stable_path

log = logging.getLogger(__name__)

DRAIN_GRACE_S = 5.0  # beyond the drain time-out, for the gateway to end by itself
BUDGET_WINDOW_S = 60.0  # `max_restarts` deaths of a service within this time are forgiven
STANDBY_AFTER_S = 3.0  # once it serves: a start competes with nobody for the cores, nor does its warm-up
STANDBY_LATEST_S = 20.0  # it waits so long for a moment when its role has less to do
STANDBY_AGAIN_S = 30.0  # after one has died while it waited: perhaps for want of memory
STANDBY_BYTES = 512 << 20  # must be left for one to stand by: it takes up to 250 MB, and the others grow
BACK_OFF_S = (0.0, 0.2, 1.0)  # before the first restart within the window, the second, all others
DUMP_GRACE_S = 1.0  # between the signal that has a hung process write its stacks and the one that kills it


class ExitStatus(IntEnum):
    """How the launcher ends."""

    CLEAN = 0  # stopped on request, after draining
    USAGE = 2  # wrong flag or config file
    STARTUP = 64  # the server could not start; one line says why
    DIED = 70  # a process died or did not drain in time
    INTERRUPTED = 130  # Ctrl-C before the processes were started, or as the second signal, cutting the draining short
    FORCED = 143  # SIGTERM as the second signal


class Signals:
    """SIGTERM and SIGINT as a count and a file descriptor to poll.

    Once one was counted, both are ignored from the end on: the process cleans up and ends, and whoever asks for its end
    once more must not cut that short.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)
    SAME_S = 0.1  # timeout(1) signals a process and then its group: that is one request to stop, not two

    def __init__(self) -> None:
        self.count = 0
        self.last = 0  # the signal that was counted last
        self._last_at = float("-inf")
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> "Signals":
        self._old_wakeup_fd = signal.set_wakeup_fd(self._write_fd)
        self._old = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_IGN if self.count else handler)
        signal.set_wakeup_fd(self._old_wakeup_fd)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def fileno(self) -> int:
        return self._read_fd

    def drain(self) -> None:
        os.read(self._read_fd, 4096)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last_at >= self.SAME_S:
            self.count += 1
            self.last = number
        self._last_at = now


class Supervisor:
    """The children of one server, from spawn to the last exit."""

    def __init__(
        self,
        services: Sequence[Service],
        config: ResolvedConfig,
        run_dir: Path,
        lifeline_fd: int,
        listen_fd: int,
        unix_fd: int = -1,
    ) -> None:
        """`listen_fd`, `unix_fd`: the bound sockets of HTTP, on TCP and in the file system; -1: there is none."""
        self.services = services
        self.config = config
        self.run_dir = run_dir
        self.lifeline_fd = lifeline_fd
        self.listen_fd = listen_fd
        self.unix_fd = unix_fd
        self.children: dict[str, Child] = {}  # by key
        self.status: ExitStatus | None = None  # set when the end is decided
        self.reason = ""  # the line that explains a status other than CLEAN
        self.draining_until: float | None = None
        self.was_ready = False  # all services were, once
        self._watchdogs: dict[str, Watchdog | StopTimer] = {}  # by key; a timer for who is not ready yet
        self._deaths: defaultdict[str, deque[float]] = defaultdict(deque)  # by key, within the window
        self._due: dict[str, tuple[float, int]] = {}  # by key: when to start it, and as which epoch
        self._standbys: dict[str, Child] = {}  # by role: one for whichever of its processes dies
        self._standby_due: dict[str, float] = {}  # by role: when to start one
        self._lulls: dict[str, Lull] = {}  # by role: what it waits for then

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def run(self, signals: Signals, on_ready: Callable[[], None], on_drain: Callable[[], None]) -> ExitStatus:
        """Start all services and stay until the end of the server; children may still run when this returns."""
        for service in self.services:
            self.children[service.key] = self.spawn(service)
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
            status = ExitStatus.INTERRUPTED if signals.last == signal.SIGINT else ExitStatus.FORCED
            self.end(status, "ended before the running requests were done")
        elif time.monotonic() >= (self.draining_until or 0.0):
            self.end(ExitStatus.DIED, "the gateway did not drain in time")

    @property
    def ready(self) -> bool:
        return not self._due and all(child.ready for child in self.children.values())

    def look_at_death(self, child: Child) -> None:
        """Start the service anew, unless the server was never up, or drained, or it dies again and again."""
        last = child.service.listens and self.draining_until is not None
        deaths = self.recent_deaths(child.key)
        if last or not self.was_ready or len(deaths) >= self.config.max_restarts:
            self.end_with(child)
            return
        deaths.append(time.monotonic())
        fate, allowed = child.error or child.fate, self.config.max_restarts
        log.error("The %s (pid %d) %s; starting it again (%d of %d).", *child.name, fate, len(deaths), allowed)
        self.replace(child, BACK_OFF_S[min(len(deaths), len(BACK_OFF_S)) - 1])

    def end_with(self, child: Child) -> None:
        """A death ends the server, cleanly only if it was the gateway's, drained as asked."""
        if child.service.listens and self.draining_until is not None and child.process.returncode == 0:
            self.end(ExitStatus.CLEAN)
        elif self.was_ready or child.ready:
            fate = child.error or child.fate
            self.end(ExitStatus.DIED, "the {} (pid {}) {}; ending the server".format(*child.name, fate))
        elif child.error:
            self.end(ExitStatus.STARTUP, child.error)
        else:
            self.end(ExitStatus.STARTUP, f"the {child.role} {child.fate} while starting; its last lines are above")

    def recent_deaths(self, key: str) -> "deque[float]":
        """When the last ones were, as far as they still count."""
        deaths = self._deaths[key]
        while deaths and deaths[0] < time.monotonic() - BUDGET_WINDOW_S:
            deaths.popleft()
        return deaths

    def replace(self, child: Child, delay_s: float) -> None:
        """Forget a dead child and start its service again after a while."""
        child.close()
        del self.children[child.key]
        self._watchdogs.pop(child.key, None)
        for left in (f"{child.key}.{child.epoch}", f"{child.key}.{child.epoch}.boot"):
            (self.run_dir / left).unlink(missing_ok=True)
        self._due[child.key] = time.monotonic() + delay_s, child.epoch + 1

    def spawn_due(self) -> None:
        """Start again what has waited long enough, and whoever is to stand by."""
        now = time.monotonic()
        for service in self.services:
            due_at, epoch = self._due.get(service.key, (float("inf"), 0))
            if now >= due_at:
                del self._due[service.key]
                self._start_again(service, epoch)
            if now >= self._standby_due.get(service.role, float("inf")):
                self._look_for_lull(service, now)

    def _look_for_lull(self, service: Service, now: float) -> None:
        """Have a process stand by, which takes seconds of a core, when the role's processes leave one idle."""
        role = service.role
        if role not in self._standbys:
            lull = self._lulls.setdefault(role, Lull(now + STANDBY_LATEST_S))
            if not lull.is_here(now, [child.process.pid for child in self.children.values() if child.role == role]):
                self._standby_due[role] = now + LOOK_FOR_LULL_S
                return
            self._stand_by(service)
        self._lulls.pop(role, None)
        del self._standby_due[role]

    def _start_again(self, service: Service, epoch: int) -> None:
        try:
            self.children[service.key] = self.spawn(service, epoch)
        except OSError as error:
            self.end(ExitStatus.DIED, f"the {service.key} cannot be started again: {error}")

    def look_at_standbys(self) -> None:
        """Have another process stand by for one that died while it waited."""
        for role, child in list(self._standbys.items()):
            if child.exited:
                child.close()
                del self._standbys[role]
                self._standby_due[role] = time.monotonic() + STANDBY_AGAIN_S

    def _wants_standby(self, service: Service) -> bool:
        disabled = self.config.disable_standby or self.config.low_memory
        return bool(service.standby and self.config.max_restarts and not disabled)

    def _stand_by(self, service: Service) -> None:
        memory = look()
        if memory.available < STANDBY_BYTES:
            left = in_words(memory.available)
            log.warning("No %s stands by: %s may still be used by %s.", service.role, left, memory.limit)
            return
        try:
            self._standbys[service.role] = start(service, self.inherited(service), standby=True)
        except OSError as error:
            log.warning("No %s stands by: %s.", service.role, error)

    def spawn(self, service: Service, epoch: int = 0) -> Child:
        """Start one incarnation of a service, with the process that stands by for it where there is one."""
        child = self._standbys.pop(service.role, None)
        if child is not None and not child.can_start:
            child.process.kill()
            child.process.wait()
            child.close()
            child = None
        child = child or start(service, self.inherited(service))
        child.service = service  # who stood by may become any process of the role
        boot_file = self.run_dir / f"{service.key}.{epoch}.boot"
        try:
            boot_file.touch(mode=0o600)  # the gateway's holds the keys
            boot_file.write_bytes(msgspec.msgpack.encode(self.boot(service, epoch, child.their_ready_fd)))
        except OSError:
            child.process.kill()  # else it would speak of a start by hand
            raise
        point_stable_path(str(self.run_dir), service.key, epoch)
        child.give(boot_file, epoch)
        return child

    def inherited(self, service: Service) -> list[int]:
        """The launcher's descriptors that a service's process keeps."""
        listeners = (self.listen_fd, self.unix_fd) if service.listens else ()
        return [fd for fd in (self.lifeline_fd, *listeners) if fd >= 0]

    def boot(self, service: Service, epoch: int, ready_fd: int) -> Boot:
        """What a child needs to start; only the service that listens gets the keys."""
        run_dir = str(self.run_dir)
        roles = list(dict.fromkeys(known.role for known in self.services))
        on_gpus = self.config.device == "cuda"
        following = roles[(roles.index(service.role) + 1) % len(roles)]
        return Boot(
            role=service.role,
            rank=service.rank,
            of_role=service.of_role,
            epoch=epoch,
            run_dir=run_dir,
            inbox=endpoint(run_dir, service.key, epoch),
            outbox=stable_path(run_dir, following),
            device_numbers=device_numbers(service, os.environ, self.config.tp_size) if on_gpus else "",
            config=self.config if service.listens else keys.without(self.config),
            ready_fd=ready_fd,
            lifeline_fd=self.lifeline_fd,
            parent_pid=os.getpid(),
            listen_fd=self.listen_fd if service.listens else -1,
            unix_fd=self.unix_fd if service.listens else -1,
        )

    def wait(self, signals: Signals) -> None:
        """Block until a signal, a Ready line, the end of a child, or the time for something."""
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        for child in self._standbys.values():
            poll.register(child.pidfd, select.POLLIN)
        for child in self.children.values():
            poll.register(child.pidfd, select.POLLIN)
            if not child.ready and not child.silent:
                poll.register(child.ready_fd, select.POLLIN)
        times = [*(due_at for due_at, _ in self._due.values()), *self._standby_due.values()]
        if self.draining_until is not None:
            times.append(self.draining_until)
        if self.config.watchdog_timeout and any(child.ready for child in self.children.values()):
            times.append(time.monotonic() + LOOK_EVERY_S)
        timeout_ms = max(0.0, min(times) - time.monotonic()) * 1000 if times else None
        happened = poll.poll(timeout_ms)
        if any(fd == signals.fileno() for fd, _ in happened):
            signals.drain()

    def look_at_children(self) -> None:
        """Handle Ready lines, deaths and missing progress of all children, and spawn those that are due."""
        for child in self.children.values():
            if not child.ready:
                child.read_ready()
                if child.ready and self._wants_standby(child.service):
                    self._standby_due[child.role] = child.ready_at + STANDBY_AFTER_S
                if child.ready and child.epoch:
                    log.info(
                        "The %s serves again (pid %d, after %.1f s).", *child.name, child.ready_at - child.booted_at
                    )
        for child in list(self.children.values()):
            if child.exited and self.status is None:
                child.read_ready()  # its last words may have come after the first look
                self.look_at_death(child)
            elif child.ready or self.was_ready:
                self.look_at_progress(child)
        self.look_at_standbys()
        self.spawn_due()

    def look_at_progress(self, child: Child) -> None:
        """Kill a child that has not moved for too long; its stacks are written first."""
        now, timeout_s = time.monotonic(), self.config.watchdog_timeout
        if child.hung_at:
            if now - child.hung_at > DUMP_GRACE_S:
                child.process.kill()
            return
        if timeout_s and (hang := self._watchdog_of(child).reason_to_replace(timeout_s, now)):
            log.error("The %s (pid %d) %s; killing it.", *child.name, hang)
            child.hung_at = now
            child.process.send_signal(signal.SIGABRT)

    def _watchdog_of(self, child: Child) -> Watchdog | StopTimer:
        known, look = self._watchdogs.get(child.key), partial(vitals.read_vitals, child.process.pid)
        if child.ready and not isinstance(known, Watchdog):
            known = Watchdog(ProgressReader(str(self.run_dir), child.key), look)
        self._watchdogs[child.key] = known = known or StopTimer(look)
        return known

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
        everybody = [*self.children.values(), *self._standbys.values()]
        for child in everybody:
            child.process.kill()
        for child in everybody:
            child.process.wait()
            child.close()
        self.children.clear()
        self._standbys.clear()
