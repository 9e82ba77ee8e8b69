from array import array

from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.adapter_limit import MAX_OVERTAKEN, AdapterLimit
from quartet.scheduler_service.core.request import Sequence


def sequence(adapter: str = "") -> Sequence:
    request = Request(rid=adapter, params=SamplingParams(), adapter=adapter)
    return Sequence(request=request, ids=array("i", [1]), prompt_len=1)


def test_no_more_adapters_start_than_are_allowed_and_the_base_always_may() -> None:
    limit = AdapterLimit(2, [sequence("a"), sequence()])
    assert limit.may_start(sequence("b"))
    limit.started(sequence("b"))
    assert not limit.may_start(sequence("c"))
    assert limit.may_start(sequence("a")) and limit.may_start(sequence())


def test_a_request_that_is_held_back_is_overtaken_a_bounded_number_of_times() -> None:
    held, overtaking = sequence("b"), 0
    for _ in range(2 * MAX_OVERTAKEN):
        limit = AdapterLimit(1, [sequence("a")])
        assert not limit.may_start(held)
        if limit.may_start(later := sequence("a")):
            limit.started(later)
            overtaking += 1
    assert overtaking == MAX_OVERTAKEN
    assert AdapterLimit(1, []).may_start(held)
