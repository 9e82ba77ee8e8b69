"""The tokenizer of a GGUF file: the tokens that the original tokenizer gives, and refusals that say what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from quartet.runtime.model_files import gguf_tokenizer
from quartet.runtime.model_files.gguf import GgufError, Header
from quartet.runtime.model_files.gguf_config import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from quartet.runtime.model_files.gguf_tokenizer import SPLITTINGS

TEXTS = ["Hello world", "it's  12345 caffè\n\n\tx = {1};", "¿Qué?   ", "你好，世界 𝄞"]


def header(architecture: str = "llama", **tokenizer: Any) -> Header:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items() if value is not None}
    return Header(Path("model.gguf"), {"general.architecture": architecture, **metadata}, {})


def built(found: Header) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(gguf_tokenizer.tokenizer_of(found)))


def byte_level(pre: str = "gpt-2", **more: Any) -> Header:
    """A vocabulary of all bytes, three words and two special tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, "he", "ll", "hell", "<|start|>", "<|end|>", "<tool>", "[PAD262]"]
    kinds = [NORMAL] * (len(alphabet) + 3) + [CONTROL, CONTROL, USER_DEFINED, 5]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": ["h e", "l l", "he ll"]}
    return header(**{**fields, "bos_token_id": 259, "eos_token_id": 260, **more})


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_every_way_of_splitting_gives_texts_back(pre):
    tokenizer = built(byte_level(pre))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["it", "'s", "Ġ12345", "ĠABc"]),
        ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠABc"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "45", "ĠABc"]),
        ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠABc"]),
        ("gpt-4o", ["it's", "Ġ", "123", "45", "ĠABc"]),
        ("tekken", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠABc"]),
    ],
)
def test_text_is_split_as_the_name_says(pre, words):
    assert [word for word, _ in built(byte_level(pre)).pre_tokenizer.pre_tokenize_str("it's 12345 ABc")] == words


def test_merges_and_special_tokens_are_those_of_the_file():
    tokenizer = built(byte_level())
    assert tokenizer.encode("hello<|end|><tool>").tokens == ["hell", "o", "<|end|>", "<tool>"]
    assert tokenizer.decode([260, 261, 258]) == "<tool>hell"
    assert tokenizer.token_to_id("[PAD262]") is None


def test_special_tokens_are_added_where_the_file_asks_for_it():
    assert built(byte_level()).encode("he").ids == [256]
    assert built(byte_level(add_bos_token=True)).encode("he").ids == [259, 256]
    assert built(byte_level(add_bos_token=True, add_eos_token=True)).encode("he").ids == [259, 256, 260]
    assert built(byte_level("llama-bpe")).encode("he").ids == [259, 256]
    assert built(byte_level("llama-bpe", add_bos_token=False)).encode("he").ids == [256]


def sentencepiece(**more: Any) -> Header:
    """Pieces with scores, all bytes, and a run of spaces that the file writes as spaces."""
    special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    tokens = [*special, *((f"<0x{byte:02X}>", BYTE) for byte in range(256)), ("  ", USER_DEFINED)]
    pieces = ["▁", "a", "b", "c", "ab", "bc", "▁ab", "abc"]
    fields = {
        "model": "llama",
        "tokens": [*(token for token, _ in tokens), *pieces],
        "token_type": [*(kind for _, kind in tokens), *([NORMAL] * len(pieces))],
        "scores": [*([0.0] * len(tokens)), *[-10.0, -11.0, -12.0, -13.0, -2.0, -1.0, -3.0, -4.0]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return header(**{**fields, **more})


def test_pieces_are_merged_in_the_order_of_their_scores():
    tokenizer = built(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert tokenizer.encode("abc").tokens == ["abc"]  # by way of bc, which is better than ab
    assert tokenizer.encode("ab bc").tokens == ["ab", "▁", "bc"]
    assert tokenizer.encode("aé").tokens == ["a", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("a  b").tokens == ["a", "▁▁", "b"]


def test_a_space_is_put_before_a_text_where_the_file_does_not_forbid_it():
    tokenizer = built(sentencepiece(add_bos_token=False))
    assert tokenizer.encode("ab").tokens == ["▁ab"]
    assert tokenizer.decode(tokenizer.encode("ab b").ids) == "ab b"
    assert built(sentencepiece(add_space_prefix=False, add_bos_token=False)).encode("ab").tokens == ["ab"]


def test_gemma_4_lists_the_merges_of_its_pieces():
    merges = ["a b", "▁ ab", "b c"]
    found = sentencepiece(model="gemma4", merges=merges, scores=None, add_bos_token=False)
    tokenizer = built(found)
    assert tokenizer.encode("ab abc").tokens == ["ab", "▁ab", "c"]
    assert tokenizer.encode("a\né").tokens == ["a", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab  bc é").ids) == "ab  bc é"
    with pytest.raises(GgufError, match="c a in tokenizer"):
        built(sentencepiece(model="gemma4", merges=["c a"]))


def test_a_text_begins_with_bos_unless_the_file_says_otherwise():
    assert built(sentencepiece(add_space_prefix=False)).encode("ab").tokens == ["<s>", "ab"]
    both = built(sentencepiece(add_space_prefix=False, add_eos_token=True))
    assert both.encode("ab").tokens == ["<s>", "ab", "</s>"]


def test_special_tokens_of_phi_3_take_the_spaces_behind_them():
    special = built(Header(Path("a"), {**sentencepiece().metadata, "general.architecture": "phi3"}, {}))
    ids = special.encode("</s>  ab", add_special_tokens=False).ids
    assert ids == [special.token_to_id("</s>"), special.token_to_id("ab")]


def test_the_settings_name_the_special_tokens_and_the_templates():
    found = sentencepiece()
    assert gguf_tokenizer.settings_of(found) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    templates = {"tokenizer.chat_template": "{{ 1 }}", "tokenizer.chat_template.tool_use": "{{ 2 }}"}
    found = Header(found.file, {**found.metadata, **templates, "tokenizer.chat_template.a/b": "x"}, {})
    assert gguf_tokenizer.templates_of(found) == {
        "chat_template.jinja": "{{ 1 }}",
        "additional_chat_templates/tool_use.jinja": "{{ 2 }}",
    }


REFUSED: list[tuple[Header, str]] = [
    (byte_level(model="bert"), "a tokenizer of the kind bert; gpt2, llama, gemma4 are served; name a directory"),
    (byte_level(model=None), "a tokenizer of the kind None"),
    (byte_level("chatglm-bpe"), "tokenizer.ggml.pre is chatglm-bpe, a way of splitting text that is not known"),
    (byte_level(pre=7), "tokenizer.ggml.pre is 7"),
    (byte_level(tokens=None), "has no tokenizer.ggml.tokens; name a directory with a tokenizer.json"),
    (byte_level(tokens=[1, 2]), "tokenizer.ggml.tokens is no list of str"),
    (byte_level(tokens=["a"]), "has 1 tokens and 263 types of tokens"),
    (byte_level(token_type=["a"] * 263), "tokenizer.ggml.token_type is no list of int"),
    (byte_level(merges=["he"]), "he in tokenizer.ggml.merges does not join two tokens to one"),
    (byte_level(merges=["he he"]), "he he in tokenizer.ggml.merges does not join two tokens to one"),
    (byte_level(merges="h e"), "tokenizer.ggml.merges is no list"),
    (byte_level(add_bos_token=True, bos_token_id=None), "asks for the token bos, which it does not have"),
    (byte_level(add_eos_token=True, eos_token_id=9999), "asks for the token eos, which it does not have"),
    (byte_level(add_eos_token=True, eos_token_id="x"), "tokenizer.ggml.eos_token_id is x, which is no id"),
    (sentencepiece(scores=[0.0]), "tokenizer.ggml.scores must be a finite number for each token"),
    (sentencepiece(scores=[float("nan")] * 268), "tokenizer.ggml.scores must be a finite number for each token"),
    (sentencepiece(scores=None), "tokenizer.ggml.scores must be a finite number for each token"),
]


@pytest.mark.parametrize(("found", "said"), REFUSED)
def test_a_tokenizer_that_cannot_be_is_refused_by_key(found, said):
    with pytest.raises(GgufError, match=said) as refused:
        gguf_tokenizer.tokenizer_of(found)
    assert "\n" not in str(refused.value)
