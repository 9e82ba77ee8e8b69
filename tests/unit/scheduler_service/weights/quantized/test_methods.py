"""Quantized checkpoints as they lie in a directory: found, checked, read, and put in place of what serves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quartet.kernels.cpu.linear import no_pause
from quartet.runtime.control import UpdateWeightsFromDisk
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.model.registry import load_model
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.quantized import reading
from tests import checkpoints
from tests.configs import resolved
from tests.live import Live

Tensors = dict[str, torch.Tensor]
GROUP = 16
FP8 = torch.float8_e4m3fn


def words(numbers: torch.Tensor, order: list[int]) -> torch.Tensor:
    """(n, m) numbers of 4 bits → (n, m / 8) int32; nibble i is number order[i] of its word."""
    found = sum(numbers[:, own::8].long() << (4 * place) for place, own in enumerate(order))
    assert isinstance(found, torch.Tensor)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).int()


def four_bits(name: str, weight: torch.Tensor, method: str) -> tuple[Tensors, torch.Tensor]:
    """The parts of a matrix by GPTQ or AWQ, and the values that they mean."""
    groups = weight.unflatten(1, (-1, GROUP))
    least, most = groups.amin(2), groups.amax(2)
    scales = ((most - least) / 15).half()
    zeros = (-least / scales).round().clamp(1, 15)
    wide_scales, wide_zeros = (part.float().repeat_interleave(GROUP, 1) for part in (scales, zeros))
    numbers = (weight / wide_scales + wide_zeros).round().clamp(0, 15)
    order = list(range(8)) if method == "gptq" else [0, 2, 4, 6, 1, 3, 5, 7]
    packed = words(numbers, order).T if method == "gptq" else words(numbers.T, order)
    stored_zeros = words(zeros.T - int(method == "gptq"), order)
    parts = {"qweight": packed.contiguous(), "qzeros": stored_zeros.contiguous(), "scales": scales.T.contiguous()}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}, (numbers - wide_zeros) * wide_scales


def eight_bits(name: str, weight: torch.Tensor, method: str) -> tuple[Tensors, torch.Tensor]:
    """The parts of a matrix by FP8, in blocks of 24 by 16 or by rows, and the values that they mean."""
    rows, columns = weight.shape
    if method == "fp8":
        scale = torch.rand(-(-rows // 24), -(-columns // 16)) + 0.5
        wide = scale.repeat_interleave(24, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        parts = {f"{name}.weight_scale_inv": scale}
    else:
        wide = torch.rand(rows, 1) + 0.5
        parts = {f"{name}.weight_scale": wide}
    stored = (weight / wide).to(FP8)
    return {f"{name}.weight": stored, **parts}, stored.float() * wide


SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": GROUP, "desc_act": False},
    "awq": {"bits": 4, "group_size": GROUP, "version": "gemm"},
    "fp8": {"weight_block_size": [24, 16]},
    "fbgemm_fp8": {},
}


def write(directory: Path, method: str, seed: int = 0) -> Tensors:
    """A quantized model whose head and embeddings are not; returns the values of all of its tensors."""
    checkpoints.random_model(directory, seed)
    config = json.loads((directory / "config.json").read_text())
    settings = {"quant_method": method, **SETTINGS[method]}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    file = next(directory.glob("*.safetensors"))
    stored, expected = Tensors(), Tensors()
    for name, values in load_file(file).items():
        if not name.endswith("_proj.weight"):
            stored[name] = expected[name] = values
            continue
        quantize = four_bits if method in ("gptq", "awq") else eight_bits
        parts, expected[name] = quantize(name.removesuffix(".weight"), values.float(), method)
        stored |= parts
    save_file(stored, file)
    return expected


@pytest.mark.parametrize("method", SETTINGS)
def test_the_values_of_a_quantized_checkpoint_are_read(method, tmp_path, monkeypatch):
    expected = write(tmp_path, method)
    for _ in range(2):  # the second time a few rows at once
        weights = checkpoints.loaded(tmp_path)
        for name in weights.names():
            torch.testing.assert_close(weights.view(name), expected[name].float(), rtol=0, atol=0)
        monkeypatch.setattr(reading.read_quantized, "__defaults__", (600, no_pause))


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_start_serves_a_quantized_checkpoint(method, dtype, tmp_path):
    expected = write(tmp_path, method)
    config = resolved(model_path=str(tmp_path), dtype=dtype)
    weights = load_model(config, model_info.load(config), torch.device("cpu")).weights
    for name in weights.names():
        assert torch.equal(weights.view(name), expected[name].to(weights.dtype)), name


@pytest.mark.parametrize("method", SETTINGS)
def test_an_update_from_disk_serves_a_quantized_checkpoint(method, tmp_path):
    expected = write(tmp_path / "b", method, seed=1)
    live = Live(checkpoints.random_model(tmp_path / "a", 0), tmp_path)
    reply = live.call(UpdateWeightsFromDisk(model_path=str(tmp_path / "b")))
    assert reply.success, reply.message
    served = checkpoints.loaded(tmp_path / "b")
    assert all(torch.equal(served.view(name), expected[name].float()) for name in served.names())


PROJECTION = "model.layers.0.self_attn.q_proj"
DAMAGE = [
    ("gptq", "qzeros", None, f"lacks {PROJECTION}.qzeros"),
    ("gptq", "scales", torch.ones(3, 64).half(), "cannot form 3 equal groups"),
    ("gptq", "scales", torch.ones(2, 2).half(), r"scales has shape \[2, 2\]"),
    ("gptq", "qweight", torch.ones(4), "is F32"),
    ("gptq", "g_idx", torch.full((64,), 99, dtype=torch.int32), "a column belongs to a group that is not one"),
    ("awq", "qzeros", torch.ones(1, 1, dtype=torch.int32), r"qzeros has shape \[1, 1\]"),
    ("fp8", "weight_scale_inv", torch.ones(1, 1), r"weight_scale_inv has shape \[1, 1\]"),
    ("fbgemm_fp8", "weight_scale", torch.ones(3, 1), r"weight_scale has shape \[3, 1\]"),
]


@pytest.mark.parametrize(("method", "part", "value", "said"), DAMAGE)
def test_parts_that_do_not_fit_are_refused_with_the_name_of_the_tensor(method, part, value, said, tmp_path):
    write(tmp_path, method)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(f"{PROJECTION}.{part}", None)
    save_file(tensors | ({} if value is None else {f"{PROJECTION}.{part}": value}), file)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoints.loaded(tmp_path)
    assert PROJECTION in str(caught.value)


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("gptq", {"quant_method": "hqq"}, "is quantized by hqq, which is not read"),
        ("gptq", {"bits": 3}, "bits is 3; what is read is 4, 8"),
        ("gptq", {"bits": 4.0}, "bits is 4.0; what is read is 4, 8"),
        ("gptq", {"bits": "4"}, "bits is '4'; what is read is 4, 8"),
        ("gptq", {"dynamic": {"a": {}}}, "dynamic"),
        ("awq", {"version": "gemv"}, "version is gemv"),
        ("fp8", {"weight_block_size": [0, 1]}, "weight_block_size"),
    ],
)
def test_settings_that_are_not_read_are_refused(method, change, said, tmp_path):
    write(tmp_path, method)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        checkpoint_of(tmp_path)
