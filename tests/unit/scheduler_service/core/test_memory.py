from array import array

from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.memory import Memory, Verdict
from quartet.scheduler_service.core.request import Sequence


def sequence(*ids: int) -> Sequence:
    return Sequence(request=Request(rid="a", params=SamplingParams()), ids=array("i", ids), prompt_len=len(ids))


def admit(memory: Memory, *ids: int, spare: int = 0) -> Sequence:
    made = sequence(*ids)
    assert memory.admit(made, len(ids) - 1, spare) is Verdict.ADMITTED
    made.prefill_end = len(ids)
    return made


def test_an_admission_that_leaves_too_little_changes_nothing() -> None:
    memory = Memory(1, 10, reuse_prefixes=True)
    memory.release(admit(memory, 1, 2, 3), computed=3)
    assert memory.admit(sequence(1, 2, 3, 4), 3, spare=7) is Verdict.NO_ROOM
    assert (memory.used, memory.tree.evictable) == (0, 3)
    memory.check([])


def test_two_that_computed_the_same_prefix_keep_one_copy_in_the_end() -> None:
    memory = Memory(2, 20, reuse_prefixes=True)
    first, second = admit(memory, 1, 2, 3, 4, 5), admit(memory, 1, 2, 3, 4, 6)
    pages = second.pages[:]
    memory.keep(first, 5)
    memory.keep(second, 5)
    assert second.pages == pages, "pages do not change under a running sequence"
    memory.check([first, second])
    memory.release(second, 5)
    memory.release(first, 5)
    memory.check([])
    assert (memory.tree.cached, memory.used) == (2, 0)


def test_whoever_would_compute_what_another_computes_is_told_to_wait() -> None:
    memory = Memory(4, 100, reuse_prefixes=True)
    shared = range(100, 140)
    first = admit(memory, *shared, 1)
    late = sequence(*shared, 2)
    assert memory.admit(late, 40, 0) is Verdict.AWAITS_PREFIX
    assert late.pages == [] and memory.used == 11
    memory.keep(first, 41)
    assert memory.admit(late, 40, 0) is Verdict.ADMITTED
    assert late.computed == 40 and late.pages[:10] == first.pages[:10]
    memory.check([first, late])


def test_a_short_shared_beginning_is_not_waited_for() -> None:
    memory = Memory(1, 100, reuse_prefixes=True)
    admit(memory, 1, 2, 3)
    assert memory.admit(sequence(1, 2, 4), 2, 0) is Verdict.ADMITTED


def test_room_kept_for_growth_is_free_for_all_once_its_sequence_left() -> None:
    memory = Memory(1, 100, reuse_prefixes=False)
    first = admit(memory, 1, 2, 3)
    memory.release(first, computed=3)
    assert memory.pages.take(100) == list(range(1, 101))


def test_cached_prefixes_make_room_for_new_requests() -> None:
    memory = Memory(1, 10, reuse_prefixes=True)
    memory.release(admit(memory, *range(10, 20)), computed=10)
    assert (memory.pages.free, memory.available) == (0, 10)
    admit(memory, *range(30, 36))
    assert (memory.tree.cached, memory.tree.evicted) == (4, 6)
