"""What a model directory's files say together."""

import json
from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.model_files import model_info

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 8, "eos_token_id": 1}
TOKENIZER = {"added_tokens": [{"id": 1, "content": "<end>"}, {"id": 7, "content": "<turn>", "special": True}]}


def eos_ids(directory: Path, **files: Any) -> list[int]:
    """The end tokens of a model with these files beside its config.json."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return model_info.load(ServerConfig(model_path=str(directory))).eos_ids


def test_a_model_without_other_files_ends_with_what_its_config_names(tmp_path: Path) -> None:
    assert eos_ids(tmp_path) == [1]


def test_the_generation_config_adds_to_it(tmp_path: Path) -> None:
    assert eos_ids(tmp_path, generation_config={"eos_token_id": [1, 5]}) == [1, 5]


@pytest.mark.parametrize("token", ["<turn>", {"content": "<turn>"}])
def test_the_tokenizers_own_end_counts_though_no_config_names_it(tmp_path: Path, token: Any) -> None:
    assert eos_ids(tmp_path, tokenizer_config={"eos_token": token}, tokenizer=TOKENIZER) == [1, 7]


@pytest.mark.parametrize("tokenizer", [{}, TOKENIZER, "not JSON"])
def test_an_end_that_the_tokenizer_does_not_hold_adds_nothing(tmp_path: Path, tokenizer: Any) -> None:
    assert eos_ids(tmp_path, tokenizer_config={"eos_token": "<gone>"}, tokenizer=tokenizer) == [1]


def test_ids_outside_of_the_vocabulary_end_nothing(tmp_path: Path) -> None:
    assert eos_ids(tmp_path, generation_config={"eos_token_id": [-1, 100, 99]}) == [1, 99]
