import random

from hypothesis import given
from hypothesis import strategies as st

from quartet.scheduler_service.core.pages import NULL_PAGE, PageAllocator, runs_of


def test_runs_of_finds_ascending_runs_in_order() -> None:
    assert list(runs_of([])) == []
    assert list(runs_of([4, 5, 6])) == [(4, 3)]
    assert list(runs_of([1, 5, 3])) == [(1, 1), (5, 1), (3, 1)]
    assert list(runs_of([7, 8, 2, 3, 9])) == [(7, 2), (2, 2), (9, 1)]


def test_a_fresh_allocator_gives_one_run_and_never_the_null_page() -> None:
    pages = PageAllocator(100).take(100)
    assert pages == list(range(NULL_PAGE + 1, 101))


def test_two_sequences_with_reserves_grow_in_one_run_each() -> None:
    allocator = PageAllocator(100)
    first, second = allocator.take(3, reserve=10), allocator.take(4, reserve=10)
    for _ in range(10):
        allocator.grow(first)
        allocator.grow(second)
    assert list(runs_of(first)) == [(first[0], 13)]
    assert list(runs_of(second)) == [(second[0], 14)]
    allocator.check_invariants()


def test_reserved_pages_are_given_to_others_when_no_other_is_free() -> None:
    allocator = PageAllocator(20)
    first = allocator.take(2, reserve=18)
    second = allocator.take(18)
    assert len(set(first + second)) == 20 and allocator.free == 0
    allocator.check_invariants()


def test_a_prefix_is_continued_by_its_neighbours_where_they_are_free() -> None:
    allocator = PageAllocator(50)
    allocator.take(10)
    assert allocator.take(5, after=10) == [11, 12, 13, 14, 15]
    elsewhere = allocator.take(5, after=3)
    assert list(runs_of(elsewhere)) == [(16, 5)]


def test_no_page_at_all_can_be_taken_behind_one_whose_neighbour_is_not_free() -> None:
    allocator = PageAllocator(50)
    allocator.take(10)
    assert allocator.take(0, after=3) == [] == allocator.take(0, after=10)
    allocator.check_invariants()


def test_a_small_run_is_preferred_to_breaking_a_large_one() -> None:
    allocator = PageAllocator(100)
    allocator.take(100)
    allocator.give([10, 11, 12])
    allocator.give(list(range(40, 90)))
    assert allocator.take(3) == [10, 11, 12]
    assert allocator.take(50) == list(range(40, 90))


def test_freed_neighbours_become_one_run() -> None:
    allocator = PageAllocator(10)
    pages = allocator.take(10)
    for page in random.Random(0).sample(pages, 10):
        allocator.give([page])
    allocator.check_invariants()
    assert allocator.take(10) == pages


def test_a_dropped_reserve_can_be_taken_as_a_run() -> None:
    allocator = PageAllocator(10)
    pages = allocator.take(2, reserve=8)
    allocator.drop_reserve(pages[-1])
    assert allocator.take(8) == list(range(3, 11))


@given(st.integers(1, 60), st.data())
def test_any_operations_keep_free_and_taken_pages_apart(total: int, data: st.DataObject) -> None:
    allocator = PageAllocator(total)
    holders: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["take", "grow", "give", "part"])):
            case "take" if allocator.free:
                after = holders[0][-1] if holders else NULL_PAGE
                holders.append(allocator.take(data.draw(st.integers(1, allocator.free)), reserve=3, after=after))
            case "grow" if holders and allocator.free:
                allocator.grow(data.draw(st.sampled_from(holders)), reserve=2)
            case "give" if holders:
                pages = holders.pop(data.draw(st.integers(0, len(holders) - 1)))
                allocator.drop_reserve(pages[-1])
                allocator.give(pages)
            case "part" if holders and len(holders[-1]) > 1:
                allocator.give([holders[-1].pop(0)])
        allocator.check_invariants()
        taken = [page for pages in holders for page in pages]
        assert len(taken) == len(set(taken)) == total - allocator.free
        assert not allocator.free_pages() & set(taken)
