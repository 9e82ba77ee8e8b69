from array import array

import pytest

from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.adapter_limit import MAX_OVERTAKEN, AdapterLimit
from quartet.scheduler_service.core.request import Sequence


def sequence(adapter: str = "", priority: int = 0) -> Sequence:
    request = Request(rid=adapter, params=SamplingParams(), adapter=adapter)
    return Sequence(request=request, ids=array("i", [1]), prompt_len=1, priority=priority)


class Case:
    """Decisions over what waits, of which each admitted request replaces the one that ran."""

    def __init__(self, running: str, *waiting: Sequence) -> None:
        self.running, self.waiting = [sequence(running)], list(waiting)
        self.limit = AdapterLimit(1, self.running, self.waiting)

    def admitted(self, *order: Sequence) -> list[Sequence]:
        """Who is admitted, asked in this order."""
        self.limit.begin()
        found = []
        for one in order:
            if self.limit.may_start(one):
                self.limit.started(one)
                found.append(one)
        self.running[:] = found or self.running
        self.waiting[:] = [one for one in self.waiting if one not in found]
        return found


def test_no_more_adapters_start_than_are_allowed_and_the_base_always_may() -> None:
    limit = AdapterLimit(2, [sequence("a"), sequence()], [])
    assert limit.may_start(sequence("b"))
    limit.started(sequence("b"))
    assert not limit.may_start(sequence("c"))
    assert limit.may_start(sequence("a")) and limit.may_start(sequence())


@pytest.mark.parametrize("first", [False, True], ids=["behind it", "before it"])
def test_a_request_that_is_held_back_is_overtaken_a_bounded_number_of_times(first: bool) -> None:
    held = sequence("b")
    case = Case("a", held)
    assert case.admitted(held) == []
    overtaking = 0
    for _ in range(2 * MAX_OVERTAKEN):
        later = sequence("a")
        overtaking += len(case.admitted(*[later, held] if first else [held, later]))
    assert (overtaking, held.overtaken) == (MAX_OVERTAKEN, MAX_OVERTAKEN)
    case.running.clear()
    assert case.admitted(sequence("a"), held) == [held] and case.limit.held is None


def test_what_has_a_higher_priority_is_not_held_back_and_does_not_count() -> None:
    held = sequence("b")
    case = Case("a", held)
    assert case.admitted(held) == []
    for _ in range(2 * MAX_OVERTAKEN):
        assert len(case.admitted(sequence("a", priority=1), held)) == 1
    assert held.overtaken == 0


def test_a_held_request_that_ends_holds_nobody_back() -> None:
    held, later = sequence("b"), sequence("a")
    held.overtaken = MAX_OVERTAKEN
    case = Case("a", held, later)
    assert case.admitted(held, later) == []
    case.waiting.remove(held)
    assert case.admitted(later) == [later]
