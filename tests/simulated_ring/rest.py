"""The end of a run: whoever is paused or has released memory is so as long as nobody ends it, then all is woken."""

from typing import TYPE_CHECKING

from quartet.runtime.control import (
    ContinueGeneration,
    ControlCommand,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    UpdateWeightsFromDisk,
)
from quartet.runtime.memory_tags import NEEDED
from tests.simulated_ring.adapters import is_refused
from tests.simulated_ring.directories import NEW_PATH
from tests.simulated_ring.faults import hold
from tests.simulated_ring.gateway import GatewayProcess
from tests.simulated_ring.load import Order, is_done
from tests.simulated_ring.scheduler import SchedulerProcess

if TYPE_CHECKING:
    from tests.simulated_ring.simulation import Simulation

PAUSED_S = 100.0  # a pause lasts at the end of a run, at most
Rest = tuple[bool | None, dict[str, bool | None]]  # whether it is paused and which memory is released; None: not known


def come_to_rest(simulation: "Simulation") -> None:
    """Let everything end, what a pause or the lack of memory holds up as well."""
    last: list[Order] = []
    while not (last and all(map(is_done, last))):
        # not until nothing is due: some look again and again whether a pause is over, or rewritten weights are replaced
        simulation.turns.run_for(PAUSED_S)
        check_rest(simulation)
        last = []
        gateway = simulation.processes["gateway"]
        woken = gateway.loop.create_task(wake(simulation, gateway, last))
        simulation.turns.run_until(woken.done)
    simulation.turns.run_until(lambda: False)


async def wake(simulation: "Simulation", gateway: GatewayProcess, orders: list[Order]) -> None:
    """Take the memory again, go on, and read what was rewritten."""
    commands: list[ControlCommand] = [ResumeMemory()] if simulation.saves_memory else []
    commands.append(ContinueGeneration())
    if simulation.directories.are_rewritten:
        commands.append(simulation.operator.update(NEW_PATH))
    for command in commands:
        orders.append(await simulation.command(gateway, command))


def check_rest(simulation: "Simulation") -> None:
    """All schedulers rest alike, as it was decided, and as the commands have left them whose outcome is known."""
    decided = simulation.processes["gateway"].ring.schedulers.decided
    paused, released = rest_of(simulation)
    for process in simulation.processes.values():
        if isinstance(process, SchedulerProcess):
            is_paused, lacks = process.scheduler.planner.paused, set(process.saver.lacks if process.saver else ())
            if decided is not None:
                rest = (is_paused, frozenset(lacks))
                hold(rest == decided.served.rest, process.key, "rests", rest, "and should", decided.served.rest)
            hold(paused in (None, is_paused), process.key, "is paused:", is_paused)
            for tag, known in released.items():
                hold(known in (None, tag in lacks), process.key, "has released", lacks, "and should have", released)


def rest_of(simulation: "Simulation") -> Rest:
    """What the operator knows."""
    paused: bool | None = False
    released: dict[str, bool | None] = dict.fromkeys(NEEDED, False)
    for order in simulation.operator.orders:
        command, done = order.command, is_done(order)
        if order.orphaned and simulation.schedulers == 1:  # it may come behind others that were sent later
            return None, {}
        match command:
            case PauseGeneration():
                paused = True if done or paused else None
            case ContinueGeneration():
                paused = False if done or paused is False else None
            case UpdateWeightsFromDisk(keep_pause=True) if not is_refused(order):
                paused = True if done or paused else None
            case ReleaseMemory() | ResumeMemory():
                new = isinstance(command, ReleaseMemory)
                for tag in set(command.tags or NEEDED):
                    released[tag] = new if done or released[tag] is new else None
    return paused, released
