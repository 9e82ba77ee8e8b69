"""Some hundred runs of the ring with deaths at any point; `python -m tests.simulated_ring --seeds N` tries more."""

import logging
from collections.abc import Iterator

import pytest

from quartet.runtime.adapters import LoadAdapter, UnloadAdapter
from quartet.runtime.control import ReleaseMemory
from tests.simulated_ring.disks import tier_of
from tests.simulated_ring.group import ranks_of
from tests.simulated_ring.load import is_done
from tests.simulated_ring.scheduler import SchedulerProcess
from tests.simulated_ring.services import FIRST_VERSION
from tests.simulated_ring.simulation import Simulation, run

SEEDS, TOGETHER = 400, 50


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SEEDS, TOGETHER))
def test_every_request_and_command_ends_as_it_should_whoever_dies(first: int) -> None:
    wrong = {seed: error for seed in range(first, first + TOGETHER) if (error := run(seed))}
    assert not wrong, "replay with: python -m tests.simulated_ring SEED --verbose"


@pytest.mark.parametrize("first", range(0, 100, TOGETHER))
def test_all_schedulers_serve_what_was_decided_whoever_dies_amid_commands(first: int) -> None:
    wrong = {seed: error for seed in range(first, first + TOGETHER) if (error := run(seed, levelling=True))}
    assert not wrong, "replay with: python -m tests.simulated_ring SEED --levelling --verbose"


def test_a_seed_gives_the_same_messages_each_time() -> None:
    traces: list[list[str]] = [[], []]
    for trace in traces:
        run(11, trace.append)
    assert traces[0] == traces[1]
    assert len(traces[0]) > 100


def test_groups_of_ranks_die_and_tiers_find_their_blocks_again() -> None:
    groups = restored = found = updated = 0
    for seed in range(150):
        if ranks_of(seed) == 1 and tier_of(seed) is None:
            continue
        simulation = Simulation(seed)
        simulation.run()
        for process in simulation.processes.values():
            if isinstance(process, SchedulerProcess):
                groups += process.group is not None and process.epoch > 0
                updated += process.group is not None and process.worker.weight_version != FIRST_VERSION
                restored += process.tier.tier.restored if process.tier is not None else 0
                found += process.found
    assert min(groups, restored, found, updated) > 0, (groups, restored, found, updated)


def test_adapters_come_and_go_and_memory_is_released() -> None:
    done = dict.fromkeys((LoadAdapter, UnloadAdapter, ReleaseMemory), 0)
    served = evicted = 0
    for seed in range(60):
        simulation = Simulation(seed)
        simulation.run()
        for order in simulation.operator.orders:
            if type(order.command) in done:
                done[type(order.command)] += is_done(order)
        served += len(simulation.adapters.labels) if simulation.adapters is not None else 0
        for process in simulation.processes.values():
            if isinstance(process, SchedulerProcess) and process.adapters is not None:
                evicted += len(process.adapters.known) - len(process.adapters.loaded)
    assert min(served, evicted, *done.values()) > 0, (served, evicted, done)
