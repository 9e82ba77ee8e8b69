"""How long work takes on a device, in seconds."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Work, device: torch.device, repeats: int = 5, warm_ups: int = 2) -> float:
    """The median over repeats, each from an idle device to an idle device."""
    for _ in range(warm_ups):
        work()
    taken = []
    for _ in range(repeats):
        settle(device)
        begun = time.perf_counter()
        work()
        settle(device)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def seconds_of_each(calls: list[Work], device: torch.device, rounds: int = 20, repeats: int = 5) -> float:
    """The time of one call when all of them follow one another, as in a recorded step.

    Calls work on memory of their own, so that together they are larger than the caches.
    """
    for call in calls:
        call()

    def all_rounds() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    if device.type != "cuda":
        return seconds(all_rounds, device, repeats) / (rounds * len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_rounds()
    return seconds(graph.replay, device, repeats) / (rounds * len(calls))
