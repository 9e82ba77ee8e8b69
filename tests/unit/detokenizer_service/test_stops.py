"""Stops in a growing text: found, held back, cut."""

import pytest
import re2
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.detokenizer_service.prefix_pattern import prefix_pattern_of
from quartet.detokenizer_service.stops import Cutter, Stops, stops_of
from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.sampling import SamplingParams


def passed(stops: Stops, pieces: list[str], trim: bool = True) -> tuple[list[str], str | None]:
    """What passes piece by piece, and the name of the stop that ended it."""
    cutter, out = Cutter(stops, trim), []
    for piece in pieces:
        text, match = cutter.feed(piece)
        out.append(text)
        if match:
            return out, match.name
    return [*out, cutter.flush()], None


def strings(*names: str) -> Stops:
    return Stops(names, ())


def patterns(*names: str) -> Stops:
    return Stops((), names)


def test_a_stop_across_three_pieces_is_cut_whole() -> None:
    assert passed(strings("</end>"), ["hello </", "en", "d> more"]) == (["hello ", "", ""], "</end>")


def test_the_longest_beginning_is_held_and_comes_out_when_it_fails() -> None:
    assert passed(strings("abcd"), ["xab", "c", "x", "abc"]) == (["x", "", "abcx", "", "abc"], None)


def test_untrimmed_the_stop_passes_and_nothing_behind_it() -> None:
    assert passed(strings("END"), ["a E", "ND b"], trim=False) == (["a ", "END"], "END")


def test_the_stop_that_starts_first_wins() -> None:
    assert passed(strings("cd", "bcd"), ["abcd"]) == (["a"], "bcd")


def test_of_stops_at_one_place_the_first_named_wins() -> None:
    assert passed(strings("ab", "a"), ["xab"]) == (["x"], "ab")


def test_a_stop_that_is_complete_does_not_wait_for_a_longer_one() -> None:
    assert passed(strings("abcd", "bc"), ["abc"]) == (["a"], "bc")


def test_text_before_an_overlapping_retry_is_not_lost() -> None:
    assert passed(strings("aab"), ["a", "a", "a", "b"]) == (["", "", "a", ""], "aab")


def test_a_pattern_holds_back_only_what_may_become_a_match() -> None:
    assert passed(patterns(r"\d{3}"), ["a1", "2", "b", "12", "3"]) == (["a", "", "12b", "", ""], r"\d{3}")


def test_a_pattern_sees_the_character_before_what_is_held() -> None:
    assert passed(patterns(r"\bend"), ["b", "end ", "end"])[0] == ["b", "end ", ""]


def test_a_pattern_anchored_at_the_start_matches_there_only() -> None:
    assert passed(patterns(r"^no"), ["yes ", "no"]) == (["yes ", "no", ""], None)


def test_an_open_pattern_holds_everything_it_could_take() -> None:
    assert passed(patterns(r"<.*>"), ["a <b ", "c", ">"]) == (["a ", "", ""], "<.*>")


def test_what_is_held_for_a_pattern_has_a_limit() -> None:
    out, _ = passed(patterns(r"(?s)a.*z"), ["a", "b" * limits.MAX_STOP_SPAN_CHARS, "c"])
    assert [len(text) for text in out] == [0, 1, limits.MAX_STOP_SPAN_CHARS + 1, 0]


def test_strings_and_patterns_work_together() -> None:
    stops = Stops(("zz",), (r"\d\d",))
    assert passed(stops, ["z", "1", "2"]) == (["", "z", ""], r"\d\d")


def test_a_pattern_too_large_for_its_beginnings_holds_everything() -> None:
    huge = r"(?:(?:(?:\pL{7}\d){3}b){2}c)"
    assert passed(patterns(huge), ["1", "2"]) == (["", "", "12"], None)


def test_no_stop_costs_nothing() -> None:
    assert stops_of(SamplingParams()) is None


def test_equal_stops_are_compiled_once() -> None:
    assert stops_of(SamplingParams(stop=["q"])) is stops_of(SamplingParams(stop="q"))


@pytest.mark.parametrize("bad", ["(", "a{2000}", r"(?=x)", r"(a)\1", "[z-a]"])
def test_a_pattern_that_is_not_re2_is_refused_by_name(bad: str) -> None:
    with pytest.raises(RequestError, match="stop_regex") as refused:
        stops_of(SamplingParams(stop_regex=bad))
    assert refused.value.field == "stop_regex"


words = st.text("abc", min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(names=st.lists(words, min_size=1, max_size=3), pieces=st.lists(st.text("abc", max_size=3), max_size=12))
def test_no_part_of_a_stop_ever_passes_and_no_other_text_is_lost(names: list[str], pieces: list[str]) -> None:
    out, name = passed(strings(*names), pieces)
    whole = "".join(pieces)
    if name is None:
        assert "".join(out) == whole
        assert not any(stop in whole for stop in names)
    else:
        seen = "".join(pieces[: len(out)])
        assert seen.startswith("".join(out) + name)
        assert not any(stop in "".join(pieces[: len(out) - 1]) for stop in names)
    for count in range(1, len(out)):
        sent, so_far = "".join(out[:count]), "".join(pieces[:count])
        held = so_far[len(sent) :]
        assert held == "" or any(stop.startswith(held) for stop in names)


atoms = st.sampled_from(["a", "b", "c", ".", "[ab]", "[^a]", r"\w", r"\x61", "(?:)", r"\Qab\E", "é"])


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeat = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}", "*?", "{0}"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, repeat).map(lambda two: f"(?:{two[0]}){two[1]}"),
        inner.map(lambda body: f"(?i:{body})"),
        inner.map(lambda body: f"(?P<n>{body})" if "?P<" not in body else body),
    )


@settings(max_examples=400, deadline=None)
@given(pattern=st.recursive(atoms, _grown, max_leaves=6), text=st.text("abcABé", max_size=8))
def test_every_beginning_of_a_match_is_a_beginning(pattern: str, text: str) -> None:
    options = re2.Options()
    options.log_errors = False
    try:
        match = re2.compile(pattern, options).search(text)
    except re2.error:
        return
    prefixes = re2.compile(prefix_pattern_of(pattern))
    for end in range(len(match.group()) + 1) if match else ():
        assert prefixes.fullmatch(match.group()[:end]), (pattern, match.group(), end)


@pytest.mark.parametrize(
    ("pattern", "not_prefixes"),
    [
        ("abc", ["b", "ac", "abcd"]),
        (r"\d{3}-x", ["12-", "1234", "x"]),
        ("a(b|c)d", ["ad", "abcd"]),
        (r"[\]^x]+y", ["y", "xz"]),
        (r"[[:digit:]]a", ["a", "11"]),
        (r"\Qa.b\E", ["axb"]),
        (r"(?i)ab|cd", ["b", "CA"]),
        (r"a{,2}b", ["ab", "aab"]),
    ],
)
def test_what_cannot_become_a_match_is_no_prefix(pattern: str, not_prefixes: list[str]) -> None:
    prefixes = re2.compile(prefix_pattern_of(pattern))
    assert [text for text in not_prefixes if prefixes.fullmatch(text)] == []


def test_a_flag_holds_for_the_branches_behind_it() -> None:
    assert passed(patterns(r"(?i)ab|cd"), ["C", "D"]) == (["", ""], r"(?i)ab|cd")


def test_large_patterns_hold_back_less_text_so_that_a_search_is_bounded() -> None:
    held = {}
    for pattern in (r"(?s)a.*z", "(?:a{30}){30}"):
        cutter = Cutter(stops_of(SamplingParams(stop_regex=pattern)), trim=True)  # type: ignore[arg-type]
        passed = "".join(cutter.feed("a" * 100)[0] for _ in range(8))
        held[pattern] = 800 - len(passed)
    assert held[r"(?s)a.*z"] == 800
    assert 100 < held["(?:a{30}){30}"] < 800


def spared_first(stops: Stops, spared: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    """What passes where nothing may stop the first pieces, and the name of the stop behind them."""
    cutter, out = Cutter(stops, trim=True), []
    for place, piece in enumerate([*spared, *pieces]):
        text, match = cutter.feed(piece, spared=place < len(spared))
        out.append(text)
        if match:
            return out, match.name
    return [*out, cutter.flush()], None


@pytest.mark.parametrize("stops", [strings("END"), patterns("E+ND")])
def test_a_stop_that_may_not_stop_yet_is_text(stops: Stops) -> None:
    out, name = spared_first(stops, ["a E", "ND b"], [" c EN", "D d"])
    assert ("".join(out), name is not None) == ("a END b c ", True)


@pytest.mark.parametrize("stops", [strings("END"), patterns("E+ND")])
def test_a_stop_that_begins_too_early_and_is_complete_in_time_stops(stops: Stops) -> None:
    out, name = spared_first(stops, ["a END E", "N"], ["D b"])
    assert ("".join(out), name is not None) == ("a END ", True)


@pytest.mark.parametrize("stops", [strings("ab", "abcd"), patterns("ab", "abcd")])
def test_held_text_with_a_stop_from_before_is_no_stop_later(stops: Stops) -> None:
    assert spared_first(stops, ["xab"], ["c", "x"]) == (["x", "", "abcx", ""], None)
