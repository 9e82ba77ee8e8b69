from array import array

from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.page_pool import Admission, PagePool
from quartet.scheduler_service.core.request import Sequence


def sequence(*ids: int) -> Sequence:
    return Sequence(request=Request(rid="a", params=SamplingParams()), ids=array("i", ids), prompt_len=len(ids))


def admit(pool: PagePool, *ids: int, spare: int = 0) -> Sequence:
    made = sequence(*ids)
    assert pool.admit(made, len(ids) - 1, spare) is Admission.ADMITTED
    made.prefill_end = len(ids)
    return made


def test_an_admission_that_leaves_too_little_changes_nothing() -> None:
    pool = PagePool(1, 10, reuse_prefixes=True)
    pool.release(admit(pool, 1, 2, 3), computed=3)
    assert pool.admit(sequence(1, 2, 3, 4), 3, spare=7) is Admission.NO_ROOM
    assert (pool.used, pool.tree.evictable) == (0, 3)
    pool.check_invariants([])


def test_of_two_that_computed_the_same_prefix_one_copy_is_cached() -> None:
    pool = PagePool(2, 20, reuse_prefixes=True)
    first, second = admit(pool, 1, 2, 3, 4, 5), admit(pool, 1, 2, 3, 4, 6)
    pages = second.pages[:]
    pool.cache(first, 5)
    pool.cache(second, 5)
    assert second.pages == pages, "pages do not change under a running sequence"
    pool.check_invariants([first, second])
    pool.release(second, 5)
    pool.release(first, 5)
    pool.check_invariants([])
    assert (pool.tree.cached, pool.used) == (2, 0)


def test_a_request_waits_for_a_prefix_that_another_is_computing() -> None:
    pool = PagePool(4, 100, reuse_prefixes=True)
    shared = range(100, 140)
    first = admit(pool, *shared, 1)
    late = sequence(*shared, 2)
    assert pool.admit(late, 40, 0) is Admission.AWAITS_PREFIX
    assert late.pages == [] and pool.used == 11
    pool.cache(first, 41)
    assert pool.admit(late, 40, 0) is Admission.ADMITTED
    assert late.computed == 40 and late.pages[:10] == first.pages[:10]
    pool.check_invariants([first, late])


def test_a_short_shared_beginning_is_not_waited_for() -> None:
    pool = PagePool(1, 100, reuse_prefixes=True)
    admit(pool, 1, 2, 3)
    assert pool.admit(sequence(1, 2, 4), 2, 0) is Admission.ADMITTED


def test_pages_reserved_for_growth_can_be_taken_once_their_sequence_has_left() -> None:
    pool = PagePool(1, 100, reuse_prefixes=False)
    first = admit(pool, 1, 2, 3)
    pool.release(first, computed=3)
    assert pool.pages.take(100) == list(range(1, 101))


def test_cached_prefixes_make_room_for_new_requests() -> None:
    pool = PagePool(1, 10, reuse_prefixes=True)
    pool.release(admit(pool, *range(10, 20)), computed=10)
    assert (pool.pages.free, pool.available) == (0, 10)
    admit(pool, *range(30, 36))
    assert (pool.tree.cached, pool.tree.evicted) == (4, 6)
