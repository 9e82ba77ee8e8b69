"""Hostile and unsupported adapters are refused by name, before memory is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import re2
import torch
from safetensors.torch import load_file, save_file

from quartet.scheduler_service.weights import adapters
from quartet.scheduler_service.weights.adapter_config import ModuleSettings, settings_of
from quartet.scheduler_service.weights.adapters import AdapterTensors, read_adapter
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from tests.adapters import write_adapter
from tests.checkpoints import layout_of, write_config

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_config(tmp_path / "base")


def read(base: Path, adapter: Path, max_rank: int = 256, modules: list[str] | None = None) -> AdapterTensors:
    return read_adapter(adapter, layout_of(base), torch.float32, max_rank, modules)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"something_new": 1}, "something_new"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r"),
        ({"r": 257}, "r"),
        ({"lora_alpha": 1e400}, "lora_alpha"),
        ({"rank_pattern": {"q_proj(": 3}}, "q_proj("),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(base: Path, settings: dict[str, Any], named: str) -> None:
    adapter = write_adapter(base, base.parent / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(CheckpointError, match=named.replace("(", r"\(")):
        read(base, adapter)


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        (f"{MODULE}.lora_A.weight", torch.zeros(5, 64), "lora_A"),
        (f"{MODULE}.lora_B.weight", torch.full((64, 4), torch.nan), "not finite"),
        (f"{MODULE}.lora_A.weight", torch.zeros(4, 64, dtype=torch.int32), "dtype"),
        (f"{MODULE}.lora_magnitude_vector.weight", torch.zeros(4), "lora_magnitude_vector"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 4), "lora_embedding_A"),
        ("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 64), "one of lora_A and lora_B"),
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", torch.zeros(4, 64), "one of lora_A and lora_B"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(base: Path, name: str, values: torch.Tensor, reason: str) -> None:
    adapter = write_adapter(base, base.parent / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {name: values}, file)
    with pytest.raises(CheckpointError, match=reason):
        read(base, adapter)


def test_an_adapter_with_more_tensors_than_the_model_takes_is_refused_before_its_header_is_read(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(base, base.parent / "adapter")
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    save_file(whole, file, metadata={"format": 'pt"data_offsets"'})
    assert read(base, adapter).rank == 4
    strays = {f"base_model.model.x.{i}.lora_A.weight": torch.zeros(1) for i in range(100)}
    save_file(whole | strays, file)
    monkeypatch.setattr(adapters, "read_headers", lambda *given: pytest.fail("the header is read"))
    most = len(whole)
    with pytest.raises(CheckpointError, match=f"has {most + 100} tensors, and .* at most {most}; the first are base"):
        read(base, adapter)


def header_file(directory: Path, header: bytes) -> None:
    (directory / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (
            b",".join(b'"\\u0061%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(5000)),
            r"has 5000 tensors, and .* the first are \\u00610, ",
        ),
        (
            b",".join(b'"\\u0061%d":{"dtype":"F32","shape":[0],"\\u0064ata_offsets":[0,0]}' % i for i in range(5000)),
            r"has 4001 tensors, and .* the first are \\u00610, ",
        ),
        (
            b'"__metadata__":{%s}' % b",".join(b'"\\u0061%d":""' % i for i in range(60_000)),
            "more values than one of an adapter of this model",
        ),
    ],
    ids=["names", "keys of entries", "metadata"],
)
def test_escaped_keys_do_not_hide_how_much_a_header_holds(
    base: Path, monkeypatch: pytest.MonkeyPatch, header: bytes, reason: str
) -> None:
    adapter = write_adapter(base, base.parent / "adapter")
    header_file(adapter, b"{%s}" % header)
    monkeypatch.setattr(adapters, "read_headers", lambda *given: pytest.fail("the header is read"))
    with pytest.raises(CheckpointError, match=reason):
        read(base, adapter)


def test_a_header_may_say_much_beside_its_tensors(base: Path) -> None:
    adapter = write_adapter(base, base.parent / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps([{"a": [1, 2]}] * 900)})
    assert read(base, adapter).rank == 4


def test_tensors_of_layers_that_the_model_lacks_are_counted_and_the_first_are_named(base: Path) -> None:
    adapter = write_adapter(base, base.parent / "adapter")
    file = adapter / "adapter_model.safetensors"
    names = [f"base_model.model.x.{i}.lora_{letter}.weight" for i in range(5) for letter in "AB"]
    save_file({name: torch.zeros(1) for name in names}, file)
    with pytest.raises(
        CheckpointError, match=r"no linear layers for 10 of the adapter's tensors \(x\.\d, x\.\d, x\.\d\)"
    ):
        read(base, adapter)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (f"{MODULE}.lora_A.weight", (257, 64), "shape"),
        (f"{MODULE}.lora_A.weight", (0, 64), "shape"),
        (f"{MODULE}.lora_A.weight", (-1, 64), "shape"),
        (f"{MODULE}.lora_A.weight", (4, 64, 1), "shape"),
        (f"{MODULE}.lora_B.weight", (4, 64), "shape"),
        (f"{MODULE}.bias", (4,), "not a factor"),
        ("base_model.model.x.lora_A.weight", (4, 64), "no linear layers"),
    ],
)
def test_what_is_announced_is_checked_before_it_is_received(
    base: Path, name: str, shape: tuple[int, ...], reason: str
) -> None:
    layout = layout_of(base)
    adapters.check_announced([f"{MODULE}.lora_B.weight"], [[64, 256]], layout, 256)
    with pytest.raises(CheckpointError, match=reason):
        adapters.check_announced([f"{MODULE}.lora_B.weight", name], [[64, 256], list(shape)], layout, 256)
    with pytest.raises(CheckpointError, match="at most"):
        adapters.check_announced([name] * 1000, [[1, 64]] * 1000, layout, 256)


def test_ranks_and_targets_are_held_to_what_the_server_allows(base: Path) -> None:
    adapter = write_adapter(base, base.parent / "adapter", rank=8)
    assert read(base, adapter, modules=["all"]).rank == 8
    with pytest.raises(CheckpointError, match="--max-lora-rank 4"):
        read(base, adapter, max_rank=4)
    with pytest.raises(CheckpointError, match="--lora-target-modules"):
        read(base, adapter, modules=["q_proj"])


def test_a_torn_file_and_a_missing_one_are_refused(base: Path) -> None:
    adapter = write_adapter(base, base.parent / "adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated"):
        read(base, adapter)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        read(base, adapter)


def test_each_pattern_is_compiled_once_however_many_modules_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_pattern = re2.compile
    monkeypatch.setattr(
        re2, "compile", lambda pattern, options: compiled.append(pattern) or compile_pattern(pattern, options)
    )
    given = {"peft_type": "LORA", "r": 4, "rank_pattern": {f"m{i}": 1 + i % 8 for i in range(20)}}
    settings = ModuleSettings(settings_of(given))
    assert [settings.rank_of(f"layers.{i}.m{i % 25}") for i in range(50)] == [
        1 + i % 25 % 8 if i % 25 < 20 else 4 for i in range(50)
    ]
    assert len(compiled) == 20


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_are_small_files_and_large_programs_are_refused(key: str) -> None:
    given = {"peft_type": "LORA", "r": 4, key: {"x{1000}" * 30 + str(i): 1 for i in range(100)}}
    with pytest.raises(CheckpointError, match="patterns that are too large together"):
        ModuleSettings(settings_of(given))
    with pytest.raises(CheckpointError, match="which cannot be read"):
        ModuleSettings(settings_of({"peft_type": "LORA", "r": 4, key: {"\\w{1000}" * 60: 1}}))


def test_patterns_for_the_names_of_thousands_of_modules_are_read() -> None:
    names = [f"model.layers.{i}.block_sparse_moe.experts.{j}.w1" for i in range(64) for j in range(64)]
    settings = ModuleSettings(settings_of({"peft_type": "LORA", "r": 4, "rank_pattern": dict.fromkeys(names, 8)}))
    assert settings.rank_of(names[-1]) == 8
