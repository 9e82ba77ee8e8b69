"""Some hundred runs of the ring with deaths at any point; `python -m tests.simulated_ring --seeds N` tries more."""

import logging
from collections.abc import Iterator

import pytest

from tests.simulated_ring.simulation import run

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


def test_a_seed_gives_the_same_messages_each_time() -> None:
    traces: list[list[str]] = [[], []]
    for trace in traces:
        run(11, trace.append)
    assert traces[0] == traces[1]
    assert len(traces[0]) > 100
