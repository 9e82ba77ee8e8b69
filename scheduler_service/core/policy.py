"""The choices that are a matter of taste: who comes first, who is sent back first, who drafts, how much will grow."""

from collections.abc import Callable, Iterable

from quartet.scheduler_service.core.memory import Memory
from quartet.scheduler_service.core.request import Sequence

LPM_QUEUE = 128  # longer queues are served in order: matching each prompt in every step would cost more than it gains
EXPECTED_TOKENS = 4096  # no request is expected to give more, whatever its limit


def by_arrival(waiting: Iterable[Sequence], memory: Memory) -> list[Sequence]:
    return sorted(waiting, key=lambda s: s.serial)


def by_longest_prefix(waiting: Iterable[Sequence], memory: Memory) -> list[Sequence]:
    """Longest cached prefix first, then in order of arrival."""
    queue = by_arrival(waiting, memory)
    if len(queue) > LPM_QUEUE or not memory.reuse_prefixes:
        return queue
    return sorted(queue, key=memory.cached_prefix, reverse=True)


def by_priority(waiting: Iterable[Sequence], memory: Memory) -> list[Sequence]:
    return sorted(waiting, key=lambda s: (-s.priority, s.serial))


ORDERS: dict[str, Callable[[Iterable[Sequence], Memory], list[Sequence]]] = {
    "fcfs": by_arrival,
    "lpm": by_longest_prefix,
    "priority": by_priority,
}


def retraction_order(running: Iterable[Sequence]) -> list[Sequence]:
    """Lowest priority first, the newest first among equals."""
    return sorted(running, key=lambda s: (s.priority, -s.serial))


def proposed_drafts(rows: list[Sequence], budget: int) -> dict[Sequence, tuple[int, ...]]:
    """What some decode rows may verify at once, `budget` tokens in all; long drafts are cut to an equal share of it."""
    found: dict[Sequence, tuple[int, ...]] = {}
    for sequence in rows if budget > 0 else ():
        left = sequence.limit - sequence.output_len - 1  # the verification itself gives one token more
        if sequence.drafter and (draft := sequence.drafter.propose(sequence.ids, min(left, budget))):
            found[sequence] = draft
    if sum(map(len, found.values())) > budget:
        found = {sequence: draft[: budget // len(found)] for sequence, draft in found.items()}
    return found


class Growth:
    """How much of its allowance a running request is expected to use: hopeful at rest, sober after a retraction."""

    START = 0.7
    FLOOR = 0.1
    DECAY = 0.001  # per decode step
    PENALTY = 0.25  # per retraction

    def __init__(self) -> None:
        self.ratio = self.START

    def tokens(self, sequence: Sequence) -> float:
        """Output tokens that the sequence is still expected to give."""
        return min(sequence.limit - sequence.output_len, EXPECTED_TOKENS) * self.ratio

    def decay(self) -> None:
        self.ratio = max(self.FLOOR, self.ratio - self.DECAY)

    def penalise(self) -> None:
        self.ratio = min(1.0, self.ratio + self.PENALTY)

    def rest(self) -> None:
        self.ratio = self.START
