"""Who goes back to the queue so that a request of higher priority has room. Pure.

A preempted request keeps its output and goes on where it was. Priorities only ever displace lower ones, and whoever was
displaced comes behind in the queue, so two requests never take each other's place in turns.
"""

from collections.abc import Callable, Collection

from quartet.scheduler_service.core.policy import retraction_order
from quartet.scheduler_service.core.request import Sequence


def lesser(first: Sequence, running: Collection[Sequence], threshold: int) -> list[Sequence]:
    """Those whom `first` may displace."""
    return [s for s in running if first.priority - s.priority > threshold and not (s.finish or s.leaving)]


def victims(
    candidates: list[Sequence],
    running: Collection[Sequence],
    free_slots: int,
    missing_pages: int,
    growth_pages: Callable[[Collection[Sequence]], int],
) -> list[Sequence]:
    """As few of the candidates as give room, the least important first; none where there is room or cannot be.

    `missing_pages`: what the request lacks without growth. `growth_pages`: how many it and those who stay will need.
    Pages and slots of those that leave once their step is back are on their way already.
    """
    leaving = [s for s in running if s.finish or s.leaving]
    staying = dict.fromkeys(s for s in running if not (s.finish or s.leaving))
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
