"""GGUF files as checkpoints: names, what is undone on the way, updates of what serves, and every way of reading."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.runtime.control import UpdateWeightsFromDisk
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import gguf_directory
from quartet.scheduler_service.weights import device_staging, gguf, load, record, staging
from quartet.scheduler_service.weights.checkpoint import MAX_TENSORS, Checkpoint, CheckpointError
from quartet.scheduler_service.weights.formats import checkpoint_of, format_of
from quartet.scheduler_service.weights.manifest import manifest_of
from quartet.scheduler_service.weights.parameters import Weights
from tests import checkpoints, gguf_files
from tests.configs import resolved
from tests.gguf_files import F16, F32, Q8_0, Stored
from tests.live import Live
from tests.stepper import tokenized

CPU = torch.device("cpu")
PROMPT = list(range(10, 31))
LLAMA = {"general.architecture": "llama", "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}


def random_file(directory: Path, seed: int = 0, type: int = Q8_0, **changes: Any) -> tuple[Path, Path]:
    """A random model as safetensors, and as a GGUF file."""
    original = checkpoints.random_model(directory / f"original-{seed}", seed, **changes)
    return original, gguf_files.convert(original, directory / f"model-{seed}.gguf", type)


def version_file(directory: Path, token: int, **changes: Any) -> Path:
    """A GGUF file whose model answers this token always."""
    original = checkpoints.version_model(directory / f"original-{token}", token, **changes)
    return gguf_files.convert(original, directory / f"version-{token}.gguf")


def described(file: Path, run_dir: Path) -> Path:
    return gguf_directory.described(file, run_dir, tokenizer=False)


def loaded(directory: Path, dtype: torch.dtype = torch.float32) -> Weights:
    weights = Weights(checkpoints.layout_of(directory), dtype, CPU)
    checkpoint = checkpoint_of(directory)
    load.check_tensors(checkpoint, weights)
    load.read_weights(checkpoint, weights, checkpoint.files)
    return weights


def values(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: weights.view(name) for name in weights.names()}


def opened(directory: Path, tensors: dict[str, Stored], metadata: dict[str, Any] | None = None) -> Checkpoint:
    gguf_files.write(directory / "model.gguf", LLAMA if metadata is None else metadata, tensors)
    return checkpoint_of(directory)


def matrix(rows: int, columns: int = 4) -> Stored:
    return gguf_files.stored(torch.arange(rows * columns, dtype=torch.float32).view(rows, columns))


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    target = torch.empty(checkpoint.tensors[name].shape)
    load.read_tensors(checkpoint, {name: target}, checkpoint.files)
    return target


def test_rows_of_queries_and_keys_come_back_in_the_order_of_the_original(tmp_path):
    checkpoint = opened(tmp_path, {"blk.0.attn_q.weight": matrix(8, 1), "blk.0.attn_k.weight": matrix(4, 1)})
    assert read(checkpoint, "model.layers.0.self_attn.q_proj.weight").flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert read(checkpoint, "model.layers.0.self_attn.k_proj.weight").flatten().tolist() == [0, 2, 1, 3]


def test_experts_are_parts_of_one_tensor(tmp_path):
    metadata = LLAMA | {"llama.expert_count": 3}
    stacked = Stored(F32, (3, 2, 4), torch.arange(24, dtype=torch.float32).view(torch.uint8).numpy().tobytes())
    single = {f"blk.1.ffn_up.{expert}.weight": matrix(2) for expert in range(2)}  # as early files have them
    checkpoint = opened(tmp_path, {"blk.0.ffn_gate_exps.weight": stacked, **single}, metadata)
    last = read(checkpoint, "model.layers.0.block_sparse_moe.experts.2.w1.weight")
    assert last.tolist() == torch.arange(16, 24).view(2, 4).tolist()
    assert "model.layers.1.block_sparse_moe.experts.1.w3.weight" in checkpoint.tensors


@pytest.mark.parametrize(("files", "experts"), [(1, MAX_TENSORS + 1), (2, MAX_TENSORS // 2 + 1)])
def test_more_experts_than_any_model_has_are_refused_before_they_are_listed(files, experts, tmp_path):
    """A small file may claim them, and a file with holes needs no disk for them."""
    for file in range(files):
        name = f"blk.{file}.ffn_gate_exps.weight"
        stacked = Stored(F16, (experts, 1, 1), bytes(2 * experts))
        gguf_files.write(tmp_path / f"model-{file}.gguf", LLAMA | {"llama.expert_count": experts}, {name: stacked})
    with pytest.raises(CheckpointError, match=f"has more than {MAX_TENSORS} tensors"):
        checkpoint_of(tmp_path)


def test_tensors_that_hold_settings_are_no_weights(tmp_path):
    factors = gguf_files.stored(torch.ones(4))
    names = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    assert not opened(tmp_path, dict.fromkeys(names, factors)).tensors


def test_two_files_of_one_model_are_one_checkpoint(tmp_path):
    gguf_files.write(tmp_path / "m-00001-of-00002.gguf", LLAMA, {"token_embd.weight": matrix(2)})
    gguf_files.write(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1}, {"output.weight": matrix(2)})
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint.tensors.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    gguf_files.write(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1}, {"token_embd.weight": matrix(2)})
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight is in both"):
        checkpoint_of(tmp_path)


BAD: list[tuple[dict[str, Stored], dict[str, Any], str]] = [
    ({"blk.0.attn_q.weight": matrix(6)}, {}, "2 heads cannot share 6 rows"),
    ({"blk.0.attn_k.weight": matrix(3)}, {}, "1 heads cannot share 3 rows"),
    ({"blk.0.ffn_up_exps.weight": matrix(2)}, {"llama.expert_count": 2}, r"matrices of .* have shape \[2, 4\]"),
    ({}, {"general.architecture": "t5"}, "architecture t5, which is not supported"),
]


@pytest.mark.parametrize(("tensors", "metadata", "said"), BAD)
def test_tensors_that_do_not_fit_the_architecture_are_refused(tensors, metadata, said, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        opened(tmp_path, tensors, LLAMA | metadata)


def test_a_tensor_that_the_model_has_no_use_for_is_refused_since_the_file_describes_itself(tmp_path):
    original, _ = random_file(tmp_path)
    config = (original / "config.json").read_text()
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text(config)
    state = {name: torch.ones(shape) for name, shape in checkpoints.shapes(original).items()}
    tensors = {**state, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    found = gguf_files.tensors_of(checkpoints.CONFIG, tensors)
    heads = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    written = {name: gguf_files.stored(value) for name, value in found.items()}
    gguf_files.write(made / "model.gguf", LLAMA | heads, written)
    with pytest.raises(CheckpointError, match="the model has no use for 1 tensor"):
        loaded(made)


def test_the_formats_of_a_directory_come_in_order(tmp_path):
    assert format_of(tmp_path) == "none"
    original, file = random_file(tmp_path)
    assert format_of(tmp_path) == "gguf"
    os.link(original / "model.safetensors", tmp_path / "model.safetensors")
    assert format_of(tmp_path) == "safetensors"
    with pytest.raises(CheckpointError, match="holds weights in the format safetensors, not gguf; choose auto"):
        load.check_format("gguf", tmp_path)
    with pytest.raises(CheckpointError, match="in the format gguf, not safetensors; choose auto"):
        load.check_format("safetensors", described(file, tmp_path))


@pytest.mark.parametrize("type", [F32, F16, Q8_0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_updates_and_devices_read_the_same_values(tmp_path, type, dtype):
    directory = described(random_file(tmp_path, type=type)[1], tmp_path)
    first = values(loaded(directory, dtype))
    checkpoint = checkpoint_of(directory)
    staged, on_device = (Weights(checkpoints.layout_of(directory), dtype, CPU) for _ in range(2))
    staging.stage_checkpoint(checkpoint, staging.stable_identities(directory), staged, manifest_of(directory))
    device_staging.read_to_device(checkpoint, sorted(on_device.names()), on_device, threads=3, chunk_bytes=1000)
    for other in (staged, on_device):
        assert all(torch.equal(first[name], view) for name, view in values(other).items())


def test_blocks_are_close_to_the_values_they_were_made_of(tmp_path):
    original, file = random_file(tmp_path)
    expected, found = values(loaded(original)), values(loaded(described(file, tmp_path)))
    assert all(torch.allclose(expected[name], found[name], atol=0.02) for name in expected)
    assert not torch.equal(expected["lm_head.weight"], found["lm_head.weight"])


def test_the_log_says_that_blocks_are_expanded_and_what_that_takes(tmp_path, caplog):
    directory = described(random_file(tmp_path)[1], tmp_path)
    weights = Weights(checkpoints.layout_of(directory), torch.bfloat16, CPU)
    with caplog.at_level(logging.INFO):
        gguf.log_expansion(checkpoint_of(directory), weights)
    assert "The blocks of the GGUF file (Q8_0) are expanded to bfloat16: 0.00 GB in the file take" in caplog.text


# updates


def test_the_weights_of_a_file_take_over_while_another_file_serves(tmp_path):
    first, second = version_file(tmp_path, 100), version_file(tmp_path, 200)
    live = Live(described(first, tmp_path), tmp_path, weight_version="A")
    reply = live.call(UpdateWeightsFromDisk(model_path=str(second), weight_version="B"))
    assert (reply.success, reply.body["model_path"], reply.body["weight_version"]) == (True, str(second), "B")
    live.send(tokenized("x", PROMPT, 3, ignore_eos=True))
    live.run()
    assert live.output("x") == [200, 200, 200]


def test_a_file_and_a_directory_of_the_same_model_take_turns(tmp_path):
    original, file = random_file(tmp_path, type=F32)
    live = Live(original, tmp_path)
    logits = live.logits(PROMPT)
    assert live.call(UpdateWeightsFromDisk(model_path=str(version_file(tmp_path, 7)))).success
    assert live.call(UpdateWeightsFromDisk(model_path=str(file), load_format="gguf")).success
    assert live.logits(PROMPT) == logits
    assert live.call(UpdateWeightsFromDisk(model_path=str(original))).success
    assert live.logits(PROMPT) == logits


def test_a_restart_serves_the_file_that_was_committed_last(tmp_path):
    first, second = version_file(tmp_path, 100), version_file(tmp_path, 200)
    live = Live(described(first, tmp_path), tmp_path)
    assert live.call(UpdateWeightsFromDisk(model_path=str(second), weight_version="B")).success
    config = record.restored(resolved(model_path=str(first)), str(tmp_path))
    assert (config.model_path, config.weight_version) == (str(second), "B")
    assert Live(Path(config.model_dir), tmp_path).logits(PROMPT) == live.logits(PROMPT)
    second.unlink()
    with pytest.raises(StartupError, match="the weights that served last"):
        record.restored(resolved(model_path=str(first)), str(tmp_path))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def not_finite(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-256:] = b"\xff" * 256  # the last tensor is no padding
    file.write_bytes(data)


def other_model(file: Path) -> None:
    file.write_bytes(version_file(file.parent, 201, rope_theta=500000.0).read_bytes())


def no_gguf(file: Path) -> None:
    file.write_bytes(b"GGUF" + bytes(50))


DAMAGED: list[tuple[Callable[[Path], None], str]] = [
    (cut, "ends behind the end of the file"),
    (not_finite, "holds values that are not finite"),
    (other_model, "rope_theta is 500000.0, the model that serves has 10000.0"),
    (no_gguf, "it has version 0"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGED)
def test_an_update_from_a_file_that_is_wrong_changes_nothing(damage, said, tmp_path):
    first, second = version_file(tmp_path, 100), version_file(tmp_path, 200)
    live = Live(described(first, tmp_path), tmp_path)
    before = live.logits(PROMPT)
    damage(second)
    reply = live.call(UpdateWeightsFromDisk(model_path=str(second)))
    assert not reply.success
    assert said in reply.message
    assert live.logits(PROMPT) == before
