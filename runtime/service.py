"""What every service process does at start, and the loop of the text services.

A child is started as `python -m <service>.main`. It reads the name of its boot file from its standard input, where
that may be long in coming for one that stands by, then the Boot, sets its title, arms its own death
with the launcher's (parent-death signal, re-checked parent, lifeline pipe), binds its inbox, loads what it needs and
writes one Ready line to the ready pipe. Nothing here loads torch.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

import msgspec
import setproctitle

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.guard import Announced, Guard, Service
from quartet.runtime.log import plain, say, set_up_logging
from quartet.runtime.messages import Message, Restarted, process_key, title_of
from quartet.runtime.process import streams
from quartet.runtime.process.memory import give_back, shrink
from quartet.runtime.process.parent_death import arm_death_signal
from quartet.runtime.process.progress import IDLE_BEAT_S, ProgressWord
from quartet.runtime.process.stopwatch import STOPWATCH
from quartet.runtime.sockets import Inbox, Outbox, SocketError, newest_epoch

log = logging.getLogger(__name__)

EXIT_STARTUP = 64  # a service could not start; the message is in its Ready line
TITLE = "quartet::{role}"
STANDBY = "standby"
SYSTEM_ERRORS = (OSError, MemoryError, SocketError)  # before the service serves: the system refuses it something
REPORTED = -1  # Boot.ready_fd, once the launcher knows
NOT_BY_HAND = "services are started by `quartet serve`"


class Boot(msgspec.Struct, kw_only=True):
    """What the launcher tells a child; written to a file in the private run directory."""

    role: str
    rank: int = 0  # among the processes of the role
    of_role: int = 1  # how many those are
    epoch: int = 0
    run_dir: str
    inbox: str  # endpoint this service binds
    outbox: str  # where it sends to
    config: ResolvedConfig
    ready_fd: int
    lifeline_fd: int
    parent_pid: int
    listen_fd: int = -1  # gateway: the bound HTTP socket; -1: none on TCP
    unix_fd: int = -1  # gateway: the one of --uds
    device_numbers: str = ""  # the GPUs that this process uses, as CUDA_VISIBLE_DEVICES has them; "": as it is

    @property
    def key(self) -> str:
        """Names this process's files in the run directory."""
        return process_key(self.role, self.rank)

    @property
    def title(self) -> str:
        """The process's name without its prefix, as `ps` and the log show it."""
        return title_of(self.role, self.rank, self.of_role)

    @property
    def own_dir(self) -> str:
        """Where this process keeps its own records; the first of a role keeps them in the run directory itself."""
        return str(Path(self.run_dir) / f"{self.key}.own") if self.rank else self.run_dir


class Ready(msgspec.Struct, kw_only=True):
    """One JSON line on the ready pipe: the service serves, or why it cannot."""

    role: str
    error: str = ""


def boot_from_stdin() -> Boot:
    """Stand by until a boot file is named, and become that service."""
    STOPWATCH.mark("imports")
    setproctitle.setproctitle(TITLE.format(role=STANDBY))
    boot_file = sys.stdin.readline().strip()
    STOPWATCH.skip_wait()
    if not boot_file:
        sys.exit(NOT_BY_HAND)
    with open(boot_file, "rb") as file:
        boot = msgspec.msgpack.decode(file.read(), type=Boot)
    setproctitle.setproctitle(TITLE.format(role=boot.title))
    set_up_logging(boot.config, boot.title)
    if boot.device_numbers:
        os.environ["CUDA_VISIBLE_DEVICES"] = boot.device_numbers  # read when a device is first used
    Path(boot.own_dir).mkdir(mode=0o700, exist_ok=True)
    die_with_parent(boot)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides
    faulthandler.enable()  # a segfault leaves a stack
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    return boot


def die_with_parent(boot: Boot) -> None:
    """End this process when the launcher ends, however it ends."""
    arm_death_signal(boot.parent_pid)

    def watch() -> None:
        os.read(boot.lifeline_fd, 1)  # returns only at end of file: nobody writes
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def report_ready(boot: Boot, error: str = "") -> None:
    """Tell the launcher that this service serves, or why it cannot; the log, where the start has spent its time."""
    if not error and boot.config.low_memory:
        shrink()
    if not error:
        STOPWATCH.mark("the rest")
        log.info("The %s has started within %s.", boot.title, STOPWATCH.story())
    os.write(boot.ready_fd, msgspec.json.encode(Ready(role=boot.role, error=error)) + b"\n")
    os.close(boot.ready_fd)
    boot.ready_fd = REPORTED


def refuse(boot: Boot, error: StartupError) -> None:
    """Hand the cause to the launcher; into the log where the launcher has stopped listening for it."""
    try:
        report_ready(boot, str(error))
    except OSError:
        log.error("%s: %s", boot.title, error)


def run(main: Callable[[Boot], None]) -> NoReturn:
    """Entry point of a service: boot, run `main`, and turn any escape into a log line and an exit status."""
    try:
        boot = boot_from_stdin()
    except (OSError, MemoryError, msgspec.DecodeError) as error:  # the launcher says whose end this is
        say(f"quartet: a process cannot start: {plain(streams.cause(error))}", sys.stderr)
        os._exit(EXIT_STARTUP)
    try:
        ProgressWord(boot.run_dir, boot.key).start_pulse()
        main(boot)
    except StartupError as error:
        refuse(boot, error)
        os._exit(EXIT_STARTUP)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    except BaseException as error:
        if boot.ready_fd != REPORTED and isinstance(error, SYSTEM_ERRORS):
            log.debug("%s cannot start", boot.role, exc_info=True)
            refuse(boot, StartupError(f"the {boot.title} cannot start: {streams.cause(error)}"))
            os._exit(EXIT_STARTUP)
        log.exception("%s hit an exception:", boot.title)
        os._exit(1)
    os._exit(0)


def announced(boot: Boot) -> Announced:
    """The incarnations that the launcher has started."""
    return Announced(partial(newest_epoch, boot.run_dir), boot.config.dp_size)


class Sender(Protocol):
    def send(self, messages: Sequence[Message]) -> None: ...


def to_next(boot: Boot, progress: ProgressWord) -> Sender:
    """The way to the next service of the ring."""
    return Outbox(boot.outbox, progress.wait)


def run_text_service(boot: Boot, service: Service, way_out: Callable[[Boot, ProgressWord], Sender] = to_next) -> None:
    """Serve until killed: everything that waits in the inbox is one batch, its answers are sent together."""
    progress = ProgressWord(boot.run_dir, boot.key)
    inbox, outbox = Inbox(boot.inbox), way_out(boot, progress)
    guard = Guard(boot.role, announced(boot), service.give_up)
    give_back()
    report_ready(boot)
    if boot.epoch:
        outbox.send([Restarted(role=boot.role)])
    while True:
        patience_s = service.patience_s
        batch = inbox.recv(timeout_s=IDLE_BEAT_S if patience_s is None else patience_s)
        progress.beat(busy=bool(batch) or patience_s is not None)
        if batch or patience_s is not None:
            outbox.send(guard.batch(service, batch))
