"""What is said of each of several schedulers apart, in answers about load."""

from collections.abc import Iterator, Mapping
from typing import Any

from quartet.http_gateway.ring.counter_cache import Counters
from quartet.runtime.messages import SCHEDULER, title_of


def by_rank(counters: Counters, schedulers: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rank and counters of each scheduler that has answered; of a single one in any case."""
    for rank in range(schedulers):
        numbers = counters.get(title_of(SCHEDULER, rank, schedulers))
        if numbers is not None or schedulers == 1:
            yield rank, numbers or {}


def text_services(counters: Counters) -> dict[str, Any]:
    return {role: own for role, own in counters.items() if not role.startswith(SCHEDULER)}
