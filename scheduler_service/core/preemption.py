"""Preemption: which running requests go back to the queue so that one of higher priority can be admitted.

A preempted request keeps its output and continues from it. Only requests of lower priority are preempted, and they
queue behind the one that preempted them, so two requests never preempt each other in turns.
"""

from collections.abc import Callable, Collection

from quartet.scheduler_service.core.policy import retraction_order
from quartet.scheduler_service.core.request import Sequence


def preemptible(first: Sequence, running: Collection[Sequence], threshold: int) -> list[Sequence]:
    """The running requests whose priority is more than `threshold` below that of `first`."""
    return [s for s in running if first.priority - s.priority > threshold and not (s.finish or s.retracting)]


def choose_victims(
    candidates: list[Sequence],
    running: Collection[Sequence],
    free_slots: int,
    missing_pages: int,
    growth_pages: Callable[[Collection[Sequence]], int],
) -> list[Sequence]:
    """As few of the candidates as make room, in retraction order; none where there is room or cannot be any.

    `missing_pages`: what the request to be admitted lacks without growth. `growth_pages`: how many pages it and the
    requests that stay will need to grow. Pages and slots of requests that end or leave with the running step count as
    free.
    """
    leaving = [s for s in running if s.finish or s.retracting]
    staying = dict.fromkeys(s for s in running if not (s.finish or s.retracting))
    missing = missing_pages - sum(len(s.pages) for s in leaving)
    slots = free_slots + len(leaving)
    chosen: list[Sequence] = []
    for victim in retraction_order(candidates):
        if slots > 0 and missing + growth_pages(staying) <= 0:
            return chosen
        chosen.append(victim)
        del staying[victim]
        missing -= len(victim.pages)
        slots += 1
    return chosen if slots > 0 and missing + growth_pages(staying) <= 0 else []
