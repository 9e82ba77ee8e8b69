"""Work on data from outside whose cost nobody can tell beforehand, in a process that a budget ends.

    Guarded.run(order) ──► keeper ──fork──► worker: handle(order) ──► answer

The keeper is a small process of its own. It imports what the work needs, forks the worker and waits for it. The
worker takes one order after the other, each under the kernel's own timer; one that takes too much CPU time or memory,
or crashes, ends the worker, and the keeper forks the next. Both die with the process that started them.

A module that does such work calls `serve` in its `main`; whoever wants it done makes a `Guarded` of that module's
name. Orders and answers are bytes, and so is what the keeper prepares itself with. Nothing here loads a library.
"""

import contextlib
import mmap
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, NoReturn

from quartet.runtime.process.parent_death import arm_death_signal
from quartet.runtime.process.python_path import python_path

ORDER = struct.Struct("<QdI")  # number, CPU seconds, bytes that follow
ANSWER = struct.Struct("<QbI")  # number, a verdict, bytes that follow
NUMBER = struct.Struct("<Q")
DONE, OUT_OF_TIME, CRASHED = 0, 1, 2
PREPARE_CPU_S = 10.0
WALL_S = 30.0  # for one order: a process that is stopped, or that the machine never runs, is given up
START_WALL_S = 120.0  # for the first one of a process: imports take long on a busy machine

Handle = Callable[[bytes], bytes]
Prepare = Callable[[bytes], Handle]


class GuardedFailure(Exception):
    """An order was not carried out."""


class OutOfTime(GuardedFailure):
    """It took more than its CPU time."""


class Crashed(GuardedFailure):
    """It took more memory than it may, or ended the worker in another way."""


class Gone(GuardedFailure):
    """The process was ended before it answered, which says nothing of the order."""


class Guarded:
    """The process of one module, started with the first order and again after `end`. One order at a time."""

    def __init__(self, module: str, setup: bytes = b"", wall_s: float = WALL_S) -> None:
        """`setup`: what the module's `prepare` gets."""
        self._module = module
        self._setup = setup
        self._wall_s = wall_s
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False  # the process was killed
        self._fresh = True  # it has not answered yet
        self._lock = threading.Lock()  # of these two; never held while an answer is waited for
        self._number = 0

    @property
    def pid(self) -> int | None:
        """Of the keeper, while there is one."""
        return None if self._process is None else self._process.pid

    def run(self, order: bytes, cpu_s: float) -> bytes:
        """The answer. Raises OutOfTime, Crashed or Gone."""
        self._number += 1
        try:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(ORDER.pack(self._number, cpu_s, len(order)) + order)
            process.stdin.flush()
            verdict, answer = self._answer(process.stdout)
            self._fresh = False
        except OSError as error:
            self.end()
            raise Gone(str(error)) from error
        if verdict == OUT_OF_TIME:
            raise OutOfTime
        if verdict == CRASHED:
            raise Crashed
        return answer

    def _answer(self, stream: IO[bytes]) -> tuple[int, bytes]:
        """Verdict and bytes of the order that was sent last. Raises OSError where none comes."""
        while True:
            wall_s = max(self._wall_s, START_WALL_S) if self._fresh else self._wall_s
            readable, _, _ = select.select([stream], [], [], wall_s)
            if not readable:
                raise TimeoutError(f"no answer within {wall_s:g} s")
            number, verdict, length = ANSWER.unpack(read_exactly(stream, ANSWER.size))
            answer = read_exactly(stream, length)
            if number == self._number:
                return verdict, answer

    def _started(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._process is None or self._ended or self._process.poll() is not None:
                self._close()
                self._fresh = True
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", self._module, str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | {"PYTHONPATH": python_path(os.environ)},
                )
                assert self._process.stdin is not None
                self._process.stdin.write(NUMBER.pack(len(self._setup)) + self._setup)
            return self._process

    def end(self) -> None:
        """Kill the process, whatever it does; from any thread, and at once. Whoever waits for an answer gets Gone."""
        with self._lock:
            self._kill()

    def close(self) -> None:
        """End the process and forget it; not while somebody waits for an answer."""
        with self._lock:
            self._kill()
            self._close()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._ended = True

    def _close(self) -> None:
        if self._process is not None:
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):  # what was not sent is not wanted any more
                    stream.close()
        self._process, self._ended = None, False


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """So many bytes. Raises OSError where the stream ends before."""
    data = stream.read(size)
    if len(data) < size:
        raise ConnectionResetError("the process has ended")
    return data


# the other side


def serve(parent_pid: int, prepare: Prepare, memory_bytes: int, stack_bytes: int | None = None) -> None:
    """Be the keeper: carry out orders from stdin and answer on stdout until stdin ends.

    `memory_bytes`: of address space that keeper and worker each may take. `stack_bytes`: of the worker's stack, where
    the work goes on later in a thread that has no more.
    """
    arm_death_signal(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides
    limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_CORE, 0)
    signal.setitimer(signal.ITIMER_PROF, PREPARE_CPU_S)  # SIGPROF ends the process: no handler is set
    handle = prepare(read_setup())
    signal.setitimer(signal.ITIMER_PROF, 0)
    current = mmap.mmap(-1, NUMBER.size)  # shared with the worker: the number of its order, 0 between two
    keeper = os.getpid()
    while True:
        worker = os.fork()
        if worker == 0:
            work(keeper, handle, current, stack_bytes)
        _, status = os.waitpid(worker, 0)
        (number,) = NUMBER.unpack(current[:])
        if status == 0 or (not number and os.WIFEXITED(status)):
            return
        if number:
            timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
            write_all(1, ANSWER.pack(number, OUT_OF_TIME if timed_out else CRASHED, 0))
            current[:] = NUMBER.pack(0)


def read_setup() -> bytes:
    """What comes first on stdin; not a byte of the orders behind it."""
    with os.fdopen(0, "rb", buffering=0, closefd=False) as stream:
        (left,) = NUMBER.unpack(stream.read(NUMBER.size) or bytes(NUMBER.size))
        pieces = []
        while left and (piece := stream.read(left)):
            pieces.append(piece)
            left -= len(piece)
    return b"".join(pieces)


def work(keeper: int, handle: Handle, current: mmap.mmap, stack_bytes: int | None) -> NoReturn:
    """Be the worker: it ends with the input, or in an order that it cannot carry out. Never returns."""
    try:
        arm_death_signal(keeper)
        if stack_bytes is not None:
            limit(resource.RLIMIT_STACK, stack_bytes)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library's last words are an attacker's
        stream = os.fdopen(0, "rb", closefd=False)
        while len(head := stream.read(ORDER.size)) == ORDER.size:
            number, cpu_s, length = ORDER.unpack(head)
            order = stream.read(length)
            current[:] = NUMBER.pack(number)
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            answer = handle(order)
            signal.setitimer(signal.ITIMER_PROF, 0)
            write_all(1, ANSWER.pack(number, DONE, len(answer)) + answer)
            current[:] = NUMBER.pack(0)
        os._exit(0)
    finally:
        os._exit(1)


def limit(what: int, value: int) -> None:
    """Lower a limit of this process; one that is lower already stays."""
    soft, hard = resource.getrlimit(what)
    known = [bound for bound in (value, soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(what, (min(known), hard))


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
