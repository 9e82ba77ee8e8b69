from array import array

from quartet.scheduler_service.core.block_keys import KEY_BYTES, BlockKeys, digest


def test_a_key_stands_for_its_whole_prefix_and_its_root() -> None:
    ids, other = array("i", range(16)), array("i", [9, *range(1, 16)])
    keys = BlockKeys(b"root").first(4, ids, 4)
    assert len(set(keys)) == 4 and {len(key) for key in keys} == {KEY_BYTES}
    assert not set(keys) & set(BlockKeys(b"root").first(4, other, 4)), "one other id at the beginning"
    assert not set(keys) & set(BlockKeys(b"other").first(4, ids, 4))


def test_keys_are_made_once_as_the_sequence_grows() -> None:
    keys, ids = BlockKeys(b"root"), array("i", range(8))
    first = keys.first(2, ids, 4)
    ids.extend(range(4))
    assert keys.first(3, ids, 4)[:2] == first
    assert keys.first(1, ids, 4) == first[:1]


def test_parts_of_a_digest_do_not_run_into_each_other() -> None:
    assert digest(b"ab", b"c") != digest(b"a", b"bc")
