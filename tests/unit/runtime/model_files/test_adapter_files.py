"""Where adapters are, and what serves when an adapter is named as the model."""

import json
from pathlib import Path

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import hub
from tests.configs import resolved

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path / "base"


def adapter(directory: Path, base: object) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": base}))
    return directory


def test_the_adapters_of_the_start_get_their_directories(model: Path, tmp_path: Path) -> None:
    sql = adapter(tmp_path / "sql", None)
    config = hub.locate(resolved(model_path=str(model), lora_paths=[f"a={sql}", str(sql)]))
    assert [(found.lora_name, found.directory) for found in config.adapters] == [("a", str(sql)), (str(sql), str(sql))]
    assert config.model_dir == str(model)


def test_an_adapter_as_the_model_serves_its_base_and_itself(model: Path, tmp_path: Path) -> None:
    sql = adapter(tmp_path / "sql", str(model))
    config = hub.locate(resolved(model_path=str(sql)))
    assert (config.model_path, config.model_dir, config.tokenizer_dir) == (str(model),) * 3
    [own] = config.adapters
    assert (own.lora_name, own.lora_path, own.directory, config.enable_lora) == ("sql", str(sql), str(sql), True)


def test_an_adapter_of_the_hub_leads_to_its_base(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "hub" / "models--owner--sql"
    (repository / "snapshots").mkdir(parents=True)
    snapshot = adapter(repository / "snapshots" / ("0" * 40), str(model))
    (snapshot / "adapter_model.safetensors").write_bytes(b"")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    config = hub.locate(resolved(model_path="owner/sql", download_dir=str(tmp_path / "hub")))
    assert config.model_path == str(model)
    assert [(own.lora_name, own.directory) for own in config.adapters] == [("sql", str(snapshot))]
    config = hub.locate(resolved(model_path=str(model), lora_paths=["x=owner/sql"], download_dir=str(tmp_path / "hub")))
    assert [own.directory for own in config.adapters] == [str(snapshot)]


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "names no base; name it: --model-path BASE --lora-paths NAME="),
        (7, "names no base"),
        ("/nowhere/base", "is a LoRA adapter of /nowhere/base, which cannot be had (--model-path /nowhere/base does"),
        ("demo/../..", "is a LoRA adapter of demo/../.., which cannot be had"),
    ],
)
def test_an_adapter_without_its_base_is_refused_with_the_way_out(tmp_path: Path, base: object, said: str) -> None:
    with pytest.raises(StartupError) as refused:
        hub.locate(resolved(model_path=str(adapter(tmp_path / "sql", base))))
    assert said in str(refused.value) and "--lora-paths" in str(refused.value) and "\n" not in str(refused.value)


def test_an_adapter_is_no_base_of_another(model: Path, tmp_path: Path) -> None:
    first = adapter(tmp_path / "first", str(model))
    with pytest.raises(StartupError, match="which is no base for another one"):
        hub.locate(resolved(model_path=str(adapter(tmp_path / "second", str(first)))))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/nowhere/a", "--lora-paths /nowhere/a does not exist; an adapter is a directory or a hub id"),
        ("{model}", "has no adapter_config.json, so it is no LoRA adapter in peft's format"),
        ("{model}/config.json", "does not exist; an adapter is a directory"),
    ],
)
def test_what_is_no_adapter_is_refused_at_the_start(model: Path, path: str, said: str) -> None:
    with pytest.raises(StartupError) as refused:
        hub.locate(resolved(model_path=str(model), lora_paths=[f"a={path.format(model=model)}"]))
    assert said in str(refused.value)


def test_two_adapters_with_one_name_are_refused(model: Path, tmp_path: Path) -> None:
    sql = adapter(tmp_path / "sql", str(model))
    with pytest.raises(StartupError, match="which is also the name of --model-path"):
        hub.locate(resolved(model_path=str(sql), lora_paths=[f"sql={sql}"]))
