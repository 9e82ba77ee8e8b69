"""Reads and writes of block files in two threads, so that neither the scheduler's loop nor a read waits for a write.

The writer does its jobs in order: a block that is deleted after it was written is gone. Results wait in a queue until
the loop looks for them. Both threads have a lower priority than the steps.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from quartet.runtime.process.priority import give_way
from quartet.scheduler_service.host.block_files import BlockFiles

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Written:
    """A block is in its file, or not."""

    key: bytes
    serial: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Read:
    """The blocks of a read up to the first bad one, side by side in `data`; `damaged` is that one.

    Where there was no memory for them, it is the first, and `data` is empty.
    """

    number: int
    good: list[bytes]
    data: bytearray
    damaged: bytes | None


class BlockIO:
    """The threads over the files."""

    def __init__(self, files: BlockFiles) -> None:
        self.files = files
        self._writes: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._reads: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._results: SimpleQueue[Written | Read] = SimpleQueue()
        self._failing = False
        for name, jobs in (("KV writer", self._writes), ("KV reader", self._reads)):
            threading.Thread(target=work, args=(jobs,), name=name, daemon=True).start()

    def write(self, key: bytes, serial: int, block: memoryview, wait: Callable[[], None]) -> None:
        """Write a block whose bytes are there once `wait` has returned. Ends in a `Written`."""
        self._writes.put(lambda: self._write(key, serial, block, wait))

    def delete(self, key: bytes) -> None:
        self._writes.put(lambda: self._change(lambda: self.files.delete(key)))

    def forget(self, identity: bytes) -> None:
        """Delete all blocks, and use this identity for those that are written from now on."""
        self._writes.put(lambda: self._change(lambda: self.files.forget(identity)))

    def read(self, number: int, keys: list[bytes]) -> None:
        """Ends in a `Read`."""
        self._reads.put(lambda: self._read(number, keys))

    def results(self) -> Iterator[Written | Read]:
        """What has ended since the last call."""
        while True:
            try:
                yield self._results.get_nowait()
            except Empty:
                return

    def _write(self, key: bytes, serial: int, block: memoryview, wait: Callable[[], None]) -> None:
        ok = False
        try:
            wait()
            self.files.write(key, block)
            ok = True
            self._failing = False
        except OSError as error:
            self._failed(error)
        finally:
            self._results.put(Written(key, serial, ok))

    def _change(self, change: Callable[[], None]) -> None:
        try:
            change()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Said once, until a block is written again."""
        if not self._failing:
            log.error("No KV can be kept in %s: %s", self.files.directory, error.strerror or error)
        self._failing = True

    def _read(self, number: int, keys: list[bytes]) -> None:
        size = self.files.block_bytes
        data, good = bytearray(), list[bytes]()
        try:
            data = bytearray(size * len(keys))
            view = memoryview(data)
            for place, key in enumerate(keys):
                if not self.files.read(key, view[place * size : (place + 1) * size]):
                    break
                good.append(key)
        finally:
            damaged = keys[len(good)] if len(good) < len(keys) else None
            self._results.put(Read(number, good, data, damaged))


def work(jobs: "SimpleQueue[Callable[[], None]]") -> None:
    """Do jobs for ever; one that fails concerns nobody but itself."""
    give_way()
    while True:
        job = jobs.get()
        try:
            job()
        except Exception:
            log.exception("work on the files of --kv-cache-dir failed")
