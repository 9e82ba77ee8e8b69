"""A model directory's tokenizer gives what transformers gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info, tokenizer_files
from tests.tokenizers_to_try import KINDS, byte_level, save

TEXTS = [
    "The quick brown fox isn't 12345 years old!",
    "  two  spaces\n\n\tand a tab ",
    "你好，世界。😀👍🏽 é e\u0301",
    "<|begin|>special <|end|> inside <think> <a b>",
    "<s>[CLS] a [SEP] b</s>",
    "Привет مرحبا \x00 \ufffd",
]


def test_the_directory_is_the_tokenizers_or_else_the_models() -> None:
    assert model_info.tokenizer_dir(ServerConfig(model_path="/m")) == Path("/m")
    assert model_info.tokenizer_dir(ServerConfig(model_path="/m", tokenizer_path="/t")) == Path("/t")
    assert model_info.tokenizer_dir(ServerConfig(model_path="org/m", tokenizer_dir="/cache/m")) == Path("/cache/m")


def test_the_module_alone_loads_no_tokenizers() -> None:
    code = "import sys, quartet.runtime.model_files.tokenizer_files; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_long_text_is_neither_cut_nor_padded(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    loaded = tokenizer_files.load(save(tokenizer, tmp_path))
    assert len(loaded.encode("x y z " * 10).ids) == len(byte_level().encode("x y z " * 10).ids)
    assert [len(e.ids) for e in loaded.encode_batch(["x", "x y z"])] == [
        len(byte_level().encode(text).ids) for text in ("x", "x y z")
    ]


def test_a_directory_without_any_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--skip-tokenizer-init"):
        tokenizer_files.load(tmp_path)


@pytest.mark.slow
def test_files_that_cannot_be_converted_say_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(StartupError, match="none can be made from it"):
        tokenizer_files.load(tmp_path)


def test_a_broken_tokenizer_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(StartupError, match=r"tokenizer\.json cannot be read"):
        tokenizer_files.load(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"1": {"content": 5}}},
        {"added_tokens_decoder": {"one": {"content": "<x>"}}},
        {"added_tokens_decoder": ["<x>"]},
        {"eos_token": 5},
        {"extra_special_tokens": 5},
    ],
)
def test_tokens_declared_in_a_wrong_way_are_refused_with_the_remedy(settings: object, tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(StartupError, match=r"cannot be read: .*--tokenizer-path"):
        tokenizer_files.load(tmp_path)


def test_a_token_that_only_the_config_declares_is_added(tmp_path: Path) -> None:
    save(byte_level(), tmp_path, pad_token="<pad!>", additional_special_tokens=["<tool>"])
    loaded = tokenizer_files.load(tmp_path)
    assert loaded.encode("a<tool>").tokens[-1] == "<tool>"
    assert loaded.decode(loaded.encode("a<tool><pad!>").ids) == "a"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": True, "bos_token": "<|begin|>"},
        {"add_eos_token": True, "eos_token": "</s>"},
        {"pad_token": "<new>", "additional_special_tokens": ["<tool>"]},
        {"added_tokens_decoder": {"7000": {"content": " isn't", "special": False, "normalized": False}}},
        {"split_special_tokens": True},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_ids_are_those_of_transformers(kind: str, settings: dict[str, object], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save(KINDS[kind](), tmp_path, **settings)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizer_files.load(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False)["input_ids"]
        pair = ours.encode(text, "it is")
        assert pair.ids == theirs(text, "it is")["input_ids"]
        for skip in (True, False):
            assert ours.decode(pair.ids, skip_special_tokens=skip) == theirs.decode(
                pair.ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}], ids=str)
def test_spaces_of_llama_are_those_of_transformers(
    model_type: str, settings: dict[str, object], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    save(KINDS["byte fallback"](), tmp_path, tokenizer_class="LlamaTokenizer", **settings)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizer_files.load(tmp_path)
    for text in [*TEXTS, " lead", "<s>a</s> b</s>\nc"]:
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.slow
def test_token_types_of_a_pair_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save(KINDS["word piece"](), tmp_path, tokenizer_class="BertTokenizer")
    pair = tokenizer_files.load(tmp_path).encode("a dog", "it is")
    theirs = AutoTokenizer.from_pretrained(tmp_path)("a dog", "it is")
    assert (pair.ids, pair.type_ids) == (theirs["input_ids"], theirs["token_type_ids"])


@pytest.mark.slow
def test_vocabulary_files_in_an_older_layout_are_converted(tmp_path: Path) -> None:
    vocabulary = KINDS["word piece"]().get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    loaded = tokenizer_files.load(tmp_path)
    assert loaded.encode("The quick fox").ids == KINDS["word piece"]().encode("The quick fox").ids
