"""State that outlasts the scheduler's process: a pause, released memory, a weight update that has begun.

It is kept in the run directory, so that a restarted scheduler does not generate while the server is paused, does not
allocate memory that a trainer uses, and does not apply the second half of an update whose first half is lost.
"""

import logging

import msgspec

from quartet.runtime import records
from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.control.context import Context

log = logging.getLogger(__name__)

NAME = "durable_state.json"
LOST = "the scheduler was started again; what had been collected is lost"


class State(msgspec.Struct, kw_only=True):
    """State set by commands, and kept until other commands reset it."""

    paused: bool = False
    released: list[str] = []  # tags of /release_memory_occupation, sorted
    updating: bool = False  # between /begin_weight_update and its end


class DurableState:
    """Reads and writes the state of one run of the server."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._saved = records.read_record(run_dir, NAME, State) or State()

    def save(self, context: Context) -> None:
        """Write the current state to the run directory if it has changed."""
        released = sorted(context.saver.released) if context.saver else []
        updating = context.updates is not None and context.updates.in_session
        state = State(paused=context.planner.paused, released=released, updating=updating)
        if state == self._saved:
            return
        self._saved = state
        try:
            records.write(self._run_dir, NAME, state)
        except OSError as error:
            log.error("Could not record a pause or its end: %s. A restarted scheduler would not know of it.", error)

    def restore(self, context: Context) -> None:
        """Bring a restarted scheduler into the state that the previous one saved."""
        state = self._saved
        context.planner.paused = state.paused
        if state.released and context.saver:
            try:
                context.saver.release(state.released)
            except (CommandRefused, OSError, RuntimeError) as error:
                log.error("Memory that was released could not be released again: %s.", error)
            context.pause_without_memory()
        if state.updating and context.updates:
            context.updates.open_session(broken=LOST)
        if state != State():
            log.warning("Restored the state of the previous scheduler: %s", state)
