"""Streams and events. The device computes at once; what the host can see of it comes when the host has waited.

A copy to page-locked memory leaves poison there until it is waited for. A copy from page-locked memory remembers what
it read: whoever writes there before it was waited for hears of it at the next wait, for a device may read that late.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from tests.simulated_gpu.memory import poison

LOCK = threading.RLock()
STREAMS: "weakref.WeakSet[Stream]" = weakref.WeakSet()
IN_CAPTURE = "CUDA error: operation not permitted when stream is capturing ({})"
WAITS = "called a synchronizing CUDA operation ({})"
REWRITTEN = "page-locked memory was written to before the copy from it had been waited for"


class Stream:
    """What was put in line, as far as the host has not waited for it."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda:0")
        self.submitted = 0
        self._open: deque[tuple[int, Callable[[], None]]] = deque()
        self._around: list[Stream] = []
        STREAMS.add(self)

    def submit(self, landing: Callable[[], None]) -> None:
        """`landing`: what the host sees once this is done."""
        with LOCK:
            self.submitted += 1
            self._open.append((self.submitted, landing))

    def land(self, number: int | None = None) -> None:
        """All that was put in line up to a number is done."""
        with LOCK, torch.inference_mode():
            last = self.submitted if number is None else number
            while self._open and self._open[0][0] <= last:
                self._open.popleft()[1]()

    def wait_stream(self, other: "Stream") -> None:
        refuse_other_in_capture(self, other)
        number = other.submitted
        self.submit(lambda: other.land(number))

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        refuse_waiting("Stream.synchronize")
        self.land()

    def query(self) -> bool:
        return not self._open

    def __enter__(self) -> "Stream":
        self._around.append(HERE.stream)
        HERE.stream = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        HERE.stream = self._around.pop()


class Event:
    """A moment of a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._stream: Stream | None = None
        self._number = 0

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or HERE.stream
        self._number = self._stream.submitted

    def wait(self, stream: Stream | None = None) -> None:
        """Have a stream wait."""
        if self._stream is not None:
            own, number, waiting = self._stream, self._number, stream or HERE.stream
            refuse_other_in_capture(waiting, own)
            waiting.submit(lambda: own.land(number))

    def synchronize(self) -> None:
        """Have the host wait. Torch does not count that among what its debug mode forbids."""
        refuse_capture("Event.synchronize")
        if self._stream is not None:
            self._stream.land(self._number)


class Here(threading.local):
    """A thread's current stream, and the capture that it is in."""

    def __init__(self) -> None:
        self.stream = DEFAULT
        self.capture: Any = None


class Debugging:
    """torch.cuda.set_sync_debug_mode."""

    mode = 0  # 2: waiting is an error
    MODES = {"default": 0, "warn": 1, "error": 2}

    def set(self, mode: int | str) -> None:
        self.mode = self.MODES[mode] if isinstance(mode, str) else mode

    def get(self) -> int:
        return self.mode


DEFAULT = Stream()
HERE = Here()
DEBUGGING = Debugging()


def synchronize(device: Any = None) -> None:
    refuse_capture("torch.cuda.synchronize")
    for stream in list(STREAMS):
        stream.land()


def refuse_capture(what: str) -> None:
    if HERE.capture is not None:
        raise RuntimeError(IN_CAPTURE.format(what))


def refuse_other_in_capture(one: Stream, other: Stream) -> None:
    if HERE.capture is not None and not one is other is HERE.stream:
        raise NotImplementedError("the simulated device captures one stream only")


def refuse_waiting(what: str) -> None:
    """Raise where the host must not wait."""
    refuse_capture(what)
    if DEBUGGING.mode == Debugging.MODES["error"]:
        raise RuntimeError(WAITS.format(what))


def wait(what: str) -> None:
    """The host waits for the current stream, as a part of something else."""
    refuse_waiting(what)
    HERE.stream.land()


def send(place: torch.Tensor, host: torch.Tensor, asynchronous: bool) -> None:
    """Copy to `place`, memory of the device."""
    if not asynchronous:
        wait("a copy to the device that is no plain one from page-locked memory")
        place.copy_(host)
        return
    refuse_copy_in_capture()
    place.copy_(host)
    before = host.clone()

    def landing() -> None:
        if not torch.equal(host.view(-1).view(torch.uint8), before.view(-1).view(torch.uint8)):
            raise RuntimeError(REWRITTEN)

    HERE.stream.submit(landing)


def fetch(host: torch.Tensor, values: torch.Tensor, asynchronous: bool) -> None:
    """Copy `values`, memory of the device, to the host."""
    if not asynchronous:
        wait("a copy to the host that is no plain one to page-locked memory")
        host.copy_(values)
        return
    refuse_copy_in_capture()
    taken = values.clone()
    poison(host)

    def landing() -> None:
        host.copy_(taken)

    HERE.stream.submit(landing)


def refuse_copy_in_capture() -> None:
    if HERE.capture is not None:
        raise NotImplementedError("the simulated device records no copies from the host or to it")
