"""Prompts that are cut to the tokens that their request allows."""

import logging

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from quartet.runtime.messages import Generate, Request, Tokenized, pack_ids, unpack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.tokenizer_service import text_encoder
from quartet.tokenizer_service.encode import Encoder
from tests.tokenizers_to_try import byte_level

TOKENIZER = byte_level()
WORDS = " ".join(f"w{n}" for n in range(40))


def bracketed() -> Tokenizer:
    """A tokenizer that puts its first token before a text and its second behind it, and between two."""
    tokenizer = byte_level()
    first, last = (tokenizer.id_to_token(id) for id in (0, 1))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=[(first, 0), (last, 1)]
    )
    return tokenizer


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def tokenized(tokenizer: Tokenizer, truncate: int | None, side: str = "right", **prompt: object) -> Tokenized:
    request = Request(rid="r", params=SamplingParams(), truncate=truncate, truncate_side=side)  # type: ignore[arg-type]
    [out] = Encoder(tokenizer, token_types=True).step([Generate(request=request, **prompt)])  # type: ignore[arg-type]
    assert isinstance(out, Tokenized), out
    return out


@pytest.mark.parametrize(("side", "kept"), [("right", slice(0, 8)), ("left", slice(-8, None))])
def test_a_text_is_cut_and_keeps_what_the_tokenizer_puts_around_it(side: str, kept: slice) -> None:
    out = tokenized(bracketed(), 10, side, text=WORDS)
    assert unpack_ids(out.prompt_ids).tolist() == [0, *ids(WORDS)[kept], 1]


def test_of_a_pair_the_second_text_is_cut_first() -> None:
    out = tokenized(bracketed(), 9, text="w0", text_pair=WORDS)
    query = ids("w0")
    document = ids(WORDS)[: 9 - 3 - len(query)]
    assert unpack_ids(out.prompt_ids).tolist() == [0, *query, 1, *document, 1]
    assert unpack_ids(out.token_types).tolist() == [0] * (2 + len(query)) + [1] * (len(document) + 1)


@pytest.mark.parametrize(("side", "kept"), [("right", [1, 2, 3]), ("left", [3, 4, 5])])
def test_ids_are_cut(side: str, kept: list[int]) -> None:
    out = tokenized(TOKENIZER, 3, side, input_ids=pack_ids([1, 2, 3, 4, 5]))
    assert unpack_ids(out.prompt_ids).tolist() == kept


@pytest.mark.parametrize("truncate", [None, 1000])
def test_what_fits_stays_whole(truncate: int | None) -> None:
    out = tokenized(bracketed(), truncate, text=WORDS)
    assert unpack_ids(out.prompt_ids).tolist() == [0, *ids(WORDS), 1]


def test_fewer_tokens_than_the_tokenizer_adds_are_the_first_of_those() -> None:
    assert unpack_ids(tokenized(bracketed(), 1, text=WORDS).prompt_ids).tolist() == [0]


def test_a_cut_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenized(TOKENIZER, 2, input_ids=pack_ids([1, 2, 3]))
    assert caplog.messages == ["the prompt of request 'r' is cut from 3 to 2 tokens"]


@pytest.mark.parametrize(("side", "kept"), [("right", slice(0, 5)), ("left", slice(-5, None))])
def test_a_long_text_is_cut_before_it_is_encoded(side: str, kept: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "VERY_LONG_CHARS", 10)
    request = Request(rid="r", params=SamplingParams(), truncate=5, truncate_side=side)  # type: ignore[arg-type]
    encoder = Encoder(TOKENIZER, context_length=8)
    text = "abcdefgh" * 10_000
    [out] = encoder.step([Generate(request=request, text=text)])
    assert isinstance(out, Tokenized)
    assert unpack_ids(out.prompt_ids).tolist() == ids(text)[kept]
