"""Incremental decoding against decoding the whole."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from quartet.detokenizer_service.decode import MOST_HELD, Vocabulary
from quartet.detokenizer_service.spelling import spelling_of
from tests.tokenizers_to_try import KINDS, LINES

REPLACEMENT = "\ufffd"
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
VOCABULARIES = {kind: Vocabulary(make()) for kind, make in KINDS.items()}
every_kind = pytest.mark.parametrize("kind", KINDS)
texts = st.text(max_size=40) | st.sampled_from(LINES)


def deltas(kind: str, ids: Sequence[int], tail: Sequence[int] = (), skip: bool = True) -> list[str]:
    """What a client receives, token by token and at the end."""
    decoder = VOCABULARIES[kind].decoder(tail, skip)
    return [*(decoder.feed([id]) for id in ids), decoder.flush()]


def is_subsequence(part: str, whole: str) -> bool:
    characters = iter(whole)
    return all(character in characters for character in part)


@every_kind
@QUICK
@given(text=texts, skip=st.booleans())
def test_deltas_of_any_text_join_to_the_whole(kind: str, text: str, skip: bool) -> None:
    ids = KINDS[kind]().encode(text).ids
    assert "".join(deltas(kind, ids, skip=skip)) == KINDS[kind]().decode(ids, skip_special_tokens=skip)


@every_kind
@QUICK
@given(data=st.data(), skip=st.booleans())
def test_deltas_of_random_tokens_join_to_the_whole(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = KINDS[kind]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=30))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    joined = "".join(deltas(kind, ids, skip=skip))
    if kind.startswith("byte fallback") and REPLACEMENT in whole:
        assert is_subsequence(whole.replace(REPLACEMENT, ""), joined)  # what was whole before the fault has been sent
        return
    assert joined == whole


@every_kind
@QUICK
@given(data=st.data(), skip=st.booleans())
def test_a_whole_sequence_decodes_as_by_the_tokenizer(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = KINDS[kind]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=30))
    assert VOCABULARIES[kind].decode(ids, skip) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_ids_may_be_free_below_the_largest() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 3, "c": 900_000}, []))
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.decode([0, 1, 900_000, 3, 4_000_000_000]) == "acb"
    with pytest.raises(OverflowError):
        vocabulary.decode([-1])


@every_kind
@QUICK
@given(prompt=texts, output=texts)
def test_output_behind_a_prompt_keeps_its_leading_space(kind: str, prompt: str, output: str) -> None:
    tokenizer = KINDS[kind]()
    tail = tokenizer.encode(prompt).ids[-6:]
    ids = tokenizer.encode(output, add_special_tokens=False).ids
    before = tokenizer.decode(tail)
    whole = tokenizer.decode([*tail, *ids])
    if REPLACEMENT in before + whole:
        return
    assert before + "".join(deltas(kind, ids, tail)) == whole


@every_kind
@QUICK
@given(data=st.data())
def test_text_does_not_depend_on_how_ids_are_grouped(kind: str, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, KINDS[kind]().get_vocab_size() - 1), max_size=30))
    cut = data.draw(st.integers(0, len(ids)))
    decoder = VOCABULARIES[kind].decoder()
    grouped = decoder.feed(ids[:cut]) + decoder.feed(ids[cut:])
    assert grouped == "".join(deltas(kind, ids)[:-1])


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "byte fallback without strip"])
@QUICK
@given(text=st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), max_size=12))
def test_no_delta_holds_half_a_character(kind: str, text: str) -> None:
    text = text.replace(REPLACEMENT, "")
    ids = KINDS[kind]().encode(text, add_special_tokens=False).ids
    pieces = deltas(kind, ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == KINDS[kind]().decode(ids)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_an_unfinished_character_is_shown_at_the_end_and_not_before(kind: str) -> None:
    ids = KINDS[kind]().encode("a😀", add_special_tokens=False).ids
    pieces = deltas(kind, ids[:-1])
    assert REPLACEMENT not in "".join(pieces[:-1])
    assert set(pieces[-1]) == {REPLACEMENT}


def test_a_character_begun_by_the_prompt_is_the_outputs() -> None:
    tokenizer = KINDS["byte level"]()
    lead, trail = tokenizer.token_to_id("Ã"), tokenizer.token_to_id("©")  # how byte-level BPE spells C3 A9
    assert "".join(deltas("byte level", [trail], tail=[lead])) == "é"


def test_byte_fallback_keeps_whole_characters_sent_before_a_fault() -> None:
    ids = [KINDS["byte fallback"]().token_to_id(token) for token in ("<0x0A>", "<0xFF>")]
    assert deltas("byte fallback", ids) == ["\n", REPLACEMENT, ""]


def test_a_token_that_is_a_replacement_character_holds_no_more_than_some_text_back() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, REPLACEMENT: 1}, unk_token="a"))
    decoder = Vocabulary(tokenizer).decoder()
    pieces = [decoder.feed([1]) for _ in range(3 * MOST_HELD)]
    assert max(at - before for before, at in pairwise([0, *(at for at, piece in enumerate(pieces) if piece)])) <= (
        MOST_HELD + 1
    )
    assert "".join(pieces) + decoder.flush() == tokenizer.decode([1] * 3 * MOST_HELD)


def test_a_newline_byte_token_is_sent_at_once() -> None:
    newline = KINDS["byte fallback"]().token_to_id("<0x0A>")
    assert deltas("byte fallback", [newline])[0] == "\n"


@every_kind
def test_unknown_ids_give_no_text(kind: str) -> None:
    assert "".join(deltas(kind, [KINDS[kind]().get_vocab_size() + 100])) == ""


@every_kind
def test_a_token_by_itself_shows_special_tokens_too(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for id in (0, 1, tokenizer.get_vocab_size() - 1):
        shown = VOCABULARIES[kind].token_bytes(id).decode(errors="replace")
        assert shown.strip() == tokenizer.decode([id], skip_special_tokens=False).strip()


def test_the_byte_table_serves_the_tokenizers_made_of_bytes() -> None:
    by_table = {kind for kind, make in KINDS.items() if spelling_of(make()) is not None}
    assert by_table == {kind for kind in KINDS if kind.startswith("byte")}
