"""Scheduling policies: the order of admission and of retraction, who gets drafts, how much output to expect."""

from collections.abc import Callable, Iterable

from quartet.scheduler_service.core.page_pool import PagePool
from quartet.scheduler_service.core.request import Sequence

MAX_LPM_QUEUE = (
    128  # longer queues are served in order: matching each prompt in every step would cost more than it saves
)
MAX_EXPECTED_TOKENS = 4096  # no request is expected to generate more, whatever its limit

Order = Callable[[Iterable[Sequence], PagePool], list[Sequence]]


def by_arrival(waiting: Iterable[Sequence], pool: PagePool) -> list[Sequence]:
    return sorted(waiting, key=lambda s: s.serial)


def by_longest_prefix(waiting: Iterable[Sequence], pool: PagePool) -> list[Sequence]:
    """Longest cached prefix first, then in order of arrival."""
    queue = by_arrival(waiting, pool)
    if len(queue) > MAX_LPM_QUEUE or not pool.reuse_prefixes:
        return queue
    return sorted(queue, key=pool.cached_prefix, reverse=True)


def by_priority(waiting: Iterable[Sequence], pool: PagePool) -> list[Sequence]:
    return sorted(waiting, key=lambda s: (-s.priority, s.serial))


ORDERS: dict[str, Order] = {
    "fcfs": by_arrival,
    "lpm": by_longest_prefix,
    "priority": by_priority,
}


def retraction_order(running: Iterable[Sequence]) -> list[Sequence]:
    """Lowest priority first, the newest first among equals."""
    return sorted(running, key=lambda s: (s.priority, -s.serial))


def proposed_drafts(rows: list[Sequence], budget: int) -> dict[Sequence, tuple[int, ...]]:
    """Drafts for some decode rows, `budget` tokens in all; long ones are cut to an equal share of it."""
    found: dict[Sequence, tuple[int, ...]] = {}
    for sequence in rows if budget > 0 else ():
        left = sequence.limit - sequence.output_len - 1  # verification itself gives one token more
        most = min(left, budget, sequence.most_drafts)
        if sequence.drafter and (draft := sequence.drafter.propose(sequence.ids, most)):
            found[sequence] = draft
    if sum(map(len, found.values())) > budget:
        found = {sequence: draft[: budget // len(found)] for sequence, draft in found.items()}
    return found


class GrowthEstimate:
    """Which share of its remaining output limit a running request is expected to use.

    The share starts at START, falls a little with every decode step, and rises with every retraction.
    """

    START = 0.7
    FLOOR = 0.1
    DECAY = 0.001  # per decode step
    PENALTY = 0.25  # per retraction

    def __init__(self) -> None:
        self.ratio = self.START

    def tokens(self, sequence: Sequence) -> float:
        """Output tokens that the sequence is still expected to generate."""
        return min(sequence.limit - sequence.output_len, MAX_EXPECTED_TOKENS) * self.ratio

    def decay(self) -> None:
        self.ratio = max(self.FLOOR, self.ratio - self.DECAY)

    def penalise(self) -> None:
        self.ratio = min(1.0, self.ratio + self.PENALTY)

    def reset(self) -> None:
        self.ratio = self.START
