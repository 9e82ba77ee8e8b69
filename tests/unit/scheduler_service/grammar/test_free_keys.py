"""Patterns for keys without a character."""

import re

import pytest

from quartet.scheduler_service.grammar.free_keys import other_keys, without_character

KEYS = ["", "a", "b", "ab", "abc", "x-a", "x<a", "<", "a<b", "a b", "-"]


@pytest.mark.parametrize("pattern", ["^x-", "^x.", "", ".*", "b$", r"^\S+$", "^[^a]+$", "^[a-b]+$", "^(a|b)+$", r"\W"])
def test_the_keys_of_a_narrowed_pattern_are_those_without_the_character(pattern: str) -> None:
    narrowed = re.compile(without_character(pattern, "<"))
    for key in KEYS:
        assert bool(narrowed.fullmatch(key)) == bool(re.search(pattern, key) and "<" not in key), key


@pytest.mark.parametrize("pattern", ["<", r"\<", r"\x3c", r"\u003C", r"\x{3C}", r"\p{Sm}", "[[:punct:]<"])
def test_a_pattern_that_names_the_character_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="might spell the closing tag"):
        without_character(pattern, "<")


def test_a_set_without_the_character_stays_as_it_is() -> None:
    assert without_character("^[a-z]+$", "<") == "^(?:[a-z]+)$"
    assert without_character("^[ -~]+$", "<") == "^(?:[[ -~]&&[^<]]+)$"


@pytest.mark.parametrize("names", [["a"], ["a", "ab"], ["abc", "b", ""], ["x-a"]])
def test_other_keys_are_all_but_the_named_ones(names: list[str]) -> None:
    pattern = re.compile(
        re.sub(r"\\x\{(\w+)\}", lambda found: re.escape(chr(int(found[1], 16))), other_keys(names, "<"))
    )
    for key in KEYS:
        assert bool(pattern.fullmatch(key)) == (key not in names and "<" not in key), key
