"""Orders that stand until they are taken back: a pause, memory that is given up, a weight update that has begun.

They are noted in the run directory, so that a scheduler that is started again neither generates what nobody expects,
nor takes the memory that a trainer works in, nor serves the second half of an update whose first half is lost.
"""

import logging
from typing import TYPE_CHECKING

import msgspec

from quartet.runtime import records
from quartet.runtime.errors import CommandRefused

if TYPE_CHECKING:
    from quartet.scheduler_service.scheduler import Scheduler

log = logging.getLogger(__name__)

NAME = "standing.json"
LOST = "the scheduler was started again; what had been collected is lost"


class Orders(msgspec.Struct, kw_only=True):
    """What stands."""

    paused: bool = False
    released: list[str] = []  # tags of /release_memory_occupation, sorted
    updating: bool = False  # between /begin_weight_update and its end


class StandingOrders:
    """The orders of one boot."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._noted = records.read(run_dir, NAME, Orders) or Orders()

    def note(self, scheduler: "Scheduler") -> None:
        """Record what stands now, where that has changed."""
        released = sorted(scheduler.saver.released) if scheduler.saver else []
        updating = scheduler.updates is not None and scheduler.updates.in_session
        orders = Orders(paused=scheduler.planner.paused, released=released, updating=updating)
        if orders == self._noted:
            return
        self._noted = orders
        try:
            records.write(self._run_dir, NAME, orders)
        except OSError as error:
            log.error("Could not record a pause or its end: %s. A restarted scheduler would not know of it.", error)

    def take_up(self, scheduler: "Scheduler") -> None:
        """Follow the orders that the scheduler before had been given."""
        orders = self._noted
        scheduler.planner.paused = orders.paused
        if orders.released and scheduler.saver:
            try:
                scheduler.saver.release(orders.released)
            except (CommandRefused, OSError, RuntimeError) as error:
                log.error("Memory that had been given up is taken again: %s.", error)
            scheduler.look_at_memory()
        if orders.updating and scheduler.updates:
            scheduler.updates.open_session(broken=LOST)
        if orders != Orders():
            log.warning("Orders that stand: %s", orders)
