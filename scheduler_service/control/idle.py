"""Sleeps while nothing is asked (--sleep-when-idle-s): gives memory back, and takes it again for the next request.

The KV pool is given back, and with it what prefixes had computed. So are the weights, if they can be read again: those
that came in requests are on no disk, and those of a directory that was rewritten since are others now; these stay.

Requests that arrive meanwhile wait in the queue, commands wait here; both go on once all is back. Where the memory or
the files are not to be had, it is tried again for a minute; then this process ends, and the launcher starts another.
"""

import logging
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Protocol

from quartet.runtime.adapters import ForgetAdapter
from quartet.runtime.control import REWRITTEN, Abort, ControlCommand, Probe
from quartet.runtime.errors import CommandRefused
from quartet.runtime.memory_tags import KV_CACHE, WEIGHTS
from quartet.scheduler_service.control.context import Context
from quartet.scheduler_service.execution.memory_saver import MemorySaver
from quartet.scheduler_service.host.background import run_in_background
from quartet.scheduler_service.weights import record, reread
from quartet.scheduler_service.weights.update import Staged, Updates

log = logging.getLogger(__name__)

RETRY_S = 5.0
MOST_TRIES = 12
OVERTAKING = (Probe, Abort, ForgetAdapter)  # need neither weights nor keys and values


class WakeFailed(Exception):
    """Memory or weights are not to be had again: this process must end."""


class Sleeper(Protocol):
    """What the scheduler's loop asks."""

    sleeping: bool

    @property
    def waking(self) -> bool: ...

    def holds(self, command: ControlCommand) -> bool: ...

    def turn(self, context: Context) -> list[ControlCommand]: ...


class IdleSleep:
    """Decides once a turn of the loop whether to sleep or to wake."""

    def __init__(
        self, after_s: float, saver: MemorySaver, updates: Updates, read_again: Callable[[], Staged] | None = None
    ) -> None:
        """`saver`: of its own; what clients release is another's business.

        `read_again`: stages the committed weights; raises CommandRefused.
        """
        self.sleeping = False  # something is missing: given back, or not all back yet
        self._after_s = after_s
        self._saver = saver
        self._updates = updates
        self._read_again = read_again or partial(reread.reread, updates)
        self._files = record.files_of(Path(updates.committed.model_dir))  # as they were read, about
        self._active_at: float | None = None
        self._waking: Generator[None, bool | None, None] | None = None
        self._waking_since = 0.0
        self._tries = 0
        self._retry_at = 0.0
        self._held: list[ControlCommand] = []

    @property
    def waking(self) -> bool:
        return self._waking is not None

    def holds(self, command: ControlCommand) -> bool:
        """Whether a command waits until all is back; `turn` returns it then."""
        if not self.sleeping or isinstance(command, OVERTAKING):
            return False
        self._held.append(command)
        return True

    def turn(self, context: Context) -> list[ControlCommand]:
        """Sleep, or wake a little further. Returns the commands that need not wait any more. Raises WakeFailed."""
        now = context.now
        if not self.sleeping:
            if self._active_at is None or self._is_active(context):
                self._active_at = now
            elif now - self._active_at >= self._after_s:
                self._sleep(context)
            return []
        if self._waking is None and (self._held or context.requests) and now >= self._retry_at:
            self._waking, self._waking_since = self._wake(context), now
        return self._advance(context) if self._waking is not None else []

    def _is_active(self, context: Context) -> bool:
        """Whether there is something to do, or a client has plans with the memory or the weights."""
        updates, saver = self._updates, context.saver
        planned = context.planner.paused or context.planner.asleep or updates.session or updates.commands
        return bool(context.requests or context.launched or context.has_unfinished(ControlCommand) or planned) or bool(
            saver and saver.released
        )

    def _sleep(self, context: Context) -> None:
        tags = [KV_CACHE, WEIGHTS] if self._can_read_again() else [KV_CACHE]
        self.sleeping = True
        self._saver.release(tags)
        context.planner.forget_prefixes(keep_tier=True)
        context.pause_without_memory()
        what = "weights and KV pool" if WEIGHTS in tags else "the KV pool (the weights are on no disk)"
        log.info("Nothing was asked for %g s: gave back the memory of %s.", self._after_s, what)
        context.tell_state()

    def _can_read_again(self) -> bool:
        committed = self._updates.committed
        if committed.load_format == "dummy":
            return not committed.patched
        known = committed.files or self._files
        return not committed.patched and bool(known) and record.files_of(Path(committed.model_dir)) == known

    def _wake(self, context: Context) -> Generator[None, bool | None, None]:
        updates, saver = self._updates, self._saver
        if WEIGHTS in saver.released:
            if updates.live.device.type != "cpu":  # there the new values are copied, elsewhere memory is exchanged
                updates.live.allocate()
            staged = yield from run_in_background(self._read_again)
            version = context.worker.weight_version
            if self._files_changed():
                version = REWRITTEN.format(version)
                log.error("%s was rewritten while the server slept.", updates.committed.model_dir)
                context.planner.forget_prefixes()
            updates.swap(staged, version)
            updates.drop_second()
            context.worker.weight_version = version
            saver.resume_adapters()
            saver.released.discard(WEIGHTS)
        saver.resume([KV_CACHE])

    def _files_changed(self) -> bool:
        committed = self._updates.committed
        known = committed.files or self._files
        return committed.load_format != "dummy" and record.files_of(Path(committed.model_dir)) != known

    def _advance(self, context: Context) -> list[ControlCommand]:
        assert self._waking is not None
        try:
            next(self._waking)
            return []
        except StopIteration:
            pass
        except (CommandRefused, MemoryError, OSError, RuntimeError) as error:
            self._waking = None
            self._tries, self._retry_at = self._tries + 1, context.now + RETRY_S
            reason = str(getattr(error, "message", error)).split("\n")[0]
            log.error("The server cannot take its memory again (%d of %d): %s", self._tries, MOST_TRIES, reason)
            if self._tries >= MOST_TRIES:
                raise WakeFailed(reason) from error
            return []
        self._waking, self._tries, self.sleeping = None, 0, False
        self._active_at = context.now
        context.pause_without_memory()
        log.info("Took the memory again within %.1f s.", context.now - self._waking_since)
        context.tell_state()
        held, self._held = self._held, []
        return held
