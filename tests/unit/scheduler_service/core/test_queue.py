from array import array

import pytest

from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.queue import WaitingQueue
from quartet.scheduler_service.core.request import Sequence


def sequence(priority: int = 0, again: bool = False) -> Sequence:
    request = Request(rid="a", params=SamplingParams(), extra_key="key", again=again)
    return Sequence(request=request, ids=array("i", [1]), prompt_len=1, priority=priority)


def queue_of(*waiting: Sequence, by_priority: bool = True, max_queued: int | None = 2) -> WaitingQueue:
    queue = WaitingQueue(max_queued, by_priority)
    for item in waiting:
        queue.number(item)
        queue.put(item)
    return queue


@pytest.mark.parametrize(("max_queued", "free_slots"), [(3, 0), (2, 1), (None, 0)])
def test_below_the_limit_no_request_must_end(max_queued: int | None, free_slots: int) -> None:
    queue = queue_of(sequence(), sequence(), max_queued=max_queued)
    assert queue.overflow(sequence(), free_slots) is None


def test_above_the_limit_the_newest_of_the_lowest_priority_ends() -> None:
    first, second = sequence(priority=1), sequence(priority=1)
    assert queue_of(sequence(priority=5), first, second).overflow(sequence(priority=2), 0) is second


@pytest.mark.parametrize("policy_has_priorities", [True, False])
def test_a_newcomer_of_no_higher_priority_ends_itself(policy_has_priorities: bool) -> None:
    newcomer = sequence(priority=1)
    waiting = [sequence(priority=1 if policy_has_priorities else 0) for _ in range(2)]
    assert queue_of(*waiting, by_priority=policy_has_priorities).overflow(newcomer, 0) is newcomer


def test_a_request_that_was_admitted_before_is_not_displaced() -> None:
    newcomer = sequence(priority=9)
    assert queue_of(sequence(again=True), sequence(priority=1)).overflow(newcomer, 0) is newcomer


def test_invalidating_prefixes_moves_waiting_and_later_requests_to_a_new_namespace() -> None:
    waiting, later = sequence(), sequence()
    queue = queue_of(waiting)
    before = waiting.namespace
    queue.invalidate_prefixes()
    queue.put(later)
    assert waiting.namespace == later.namespace != before
