from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartet.scheduler_service.core.prefix_tree import PrefixTree

NAMESPACE = b"0/"


def tokens(*ids: int) -> bytes:
    return array("i", ids).tobytes()


def test_an_empty_tree_matches_nothing() -> None:
    tree = PrefixTree(1)
    node = tree.match(NAMESPACE, tokens(1, 2, 3))
    assert node is tree.root and tree.path_pages(node) == []


def test_the_longest_kept_prefix_is_matched_in_whole_pages() -> None:
    tree = PrefixTree(2)
    tree.insert(NAMESPACE, tokens(1, 2, 3, 4, 5, 6), [10, 11, 12])
    assert tree.path_pages(tree.match(NAMESPACE, tokens(1, 2, 3, 4, 5, 9, 9))) == [10, 11]
    assert tree.matched_pages(NAMESPACE, tokens(1, 2, 3, 4, 5, 6, 7)) == 3
    tree.check_invariants()


def test_a_branch_splits_the_edge_and_keeps_both_ends() -> None:
    tree = PrefixTree(1)
    tree.insert(NAMESPACE, tokens(1, 2, 3, 4), [1, 2, 3, 4])
    tree.insert(NAMESPACE, tokens(1, 2, 8, 9), [1, 2, 5, 6])
    assert tree.path_pages(tree.match(NAMESPACE, tokens(1, 2, 3, 4))) == [1, 2, 3, 4]
    assert tree.path_pages(tree.match(NAMESPACE, tokens(1, 2, 8, 9))) == [1, 2, 5, 6]
    assert tree.check_invariants() == {1, 2, 3, 4, 5, 6}


def test_what_is_there_already_is_not_taken_twice() -> None:
    tree = PrefixTree(1)
    tree.insert(NAMESPACE, tokens(1, 2), [1, 2])
    node = tree.insert(NAMESPACE, tokens(1, 2, 3), [7, 8, 9])
    assert tree.path_pages(node) == [1, 2, 9]
    assert tree.cached == 3


def test_namespaces_do_not_meet() -> None:
    tree = PrefixTree(1)
    tree.insert(b"a", tokens(1, 2), [1, 2])
    tree.insert(b"b", tokens(1, 2), [3, 4])
    assert tree.path_pages(tree.match(b"b", tokens(1, 2))) == [3, 4]
    assert tree.match(b"c", tokens(1, 2)) is tree.root
    tree.check_invariants()


def test_the_least_recently_used_leaf_goes_first_and_from_its_end() -> None:
    tree = PrefixTree(1)
    tree.insert(NAMESPACE, tokens(1, 2, 3), [1, 2, 3])
    tree.insert(NAMESPACE, tokens(7, 8, 9), [7, 8, 9])
    tree.match(NAMESPACE, tokens(1, 2, 3))
    assert tree.evict(1) == [9]
    assert tree.evict(3) == [7, 8, 3]
    assert tree.path_pages(tree.match(NAMESPACE, tokens(1, 2, 3))) == [1, 2]
    tree.check_invariants()


def test_pinned_pages_and_their_ancestors_stay() -> None:
    tree = PrefixTree(1)
    tree.insert(NAMESPACE, tokens(1, 2, 3, 4), [1, 2, 3, 4])
    node = tree.match(NAMESPACE, tokens(1, 2))
    tree.pin(node)
    assert tree.evictable == 2
    assert sorted(tree.evict(10)) == [3, 4]
    tree.unpin(node)
    assert sorted(tree.clear()) == [1, 2]
    assert (tree.cached, tree.evictable) == (0, 0)
    tree.check_invariants()


def test_a_pin_survives_a_split_above_it() -> None:
    tree = PrefixTree(1)
    node = tree.insert(NAMESPACE, tokens(1, 2, 3, 4), [1, 2, 3, 4])
    tree.pin(node)
    tree.insert(NAMESPACE, tokens(1, 2, 9), [1, 2, 9])
    assert tree.path_pages(node) == [1, 2, 3, 4]
    assert tree.evict(10) == [9]
    tree.unpin(node)
    assert tree.evictable == 4
    tree.check_invariants()


def test_a_parent_becomes_evictable_when_its_last_child_is_gone() -> None:
    tree = PrefixTree(1)
    tree.insert(NAMESPACE, tokens(1, 2), [1, 2])
    tree.insert(NAMESPACE, tokens(1, 2, 3), [1, 2, 3])
    assert tree.evict(1) == [3]
    tree.check_invariants()
    assert sorted(tree.evict(2)) == [1, 2]


def test_unpinning_more_than_was_pinned_is_refused() -> None:
    tree = PrefixTree(1)
    node = tree.insert(NAMESPACE, tokens(1), [1])
    with pytest.raises(AssertionError):
        tree.unpin(node)


def test_using_a_leaf_a_thousand_times_keeps_one_heap_entry() -> None:
    tree = PrefixTree(1)
    node = tree.insert(NAMESPACE, tokens(1), [1])
    for _ in range(1000):
        tree.pin(node)
        tree.unpin(node)
    assert len(tree._heap) == 1


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@given(st.integers(1, 3), st.lists(st.tuples(PROMPTS, st.sampled_from(["insert", "match", "evict", "pin", "unpin"]))))
def test_the_tree_agrees_with_a_plain_dictionary(page_size: int, operations: list[tuple[list[int], str]]) -> None:
    tree, model, pinned, fresh = PrefixTree(page_size), dict[tuple[int, ...], int](), [], 0
    for ids, operation in operations:
        ids = [token for token in ids for _ in range(page_size)]
        prefixes = [tuple(ids[: end * page_size]) for end in range(1, len(ids) // page_size + 1)]
        match operation:
            case "insert":
                pages = list(range(fresh, fresh + len(prefixes)))
                fresh += len(prefixes)
                tree.insert(NAMESPACE, tokens(*ids), pages)
                for prefix, page in zip(prefixes, pages, strict=True):
                    model.setdefault(prefix, page)
            case "pin":
                pinned.append(tree.match(NAMESPACE, tokens(*ids)))
                tree.pin(pinned[-1])
            case "unpin" if pinned:
                tree.unpin(pinned.pop())
            case "evict":
                gone = set(tree.evict(len(ids)))
                model = {prefix: page for prefix, page in model.items() if page not in gone}
        expected = []
        for prefix in prefixes:
            if prefix not in model:
                break
            expected.append(model[prefix])
        assert tree.matched_pages(NAMESPACE, tokens(*ids)) == len(expected)
        assert tree.path_pages(tree.match(NAMESPACE, tokens(*ids))) == expected
        assert tree.check_invariants() == set(model.values())
