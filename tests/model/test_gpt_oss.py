"""gpt-oss as it is released, with experts in MXFP4, gives what transformers gives with the values that it expands."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quartet.kernels.cpu.native import build
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.staging import check_checkpoint
from tests.model import tiny
from tests.model.dense import DenseRunner, serve
from tests.model.test_families import TOLERANCE, prompt


def write(directory: Path, seed: int = 1) -> torch.Tensor:
    """Write a small model whose experts are in MXFP4; returns transformers' logits for the prompt."""
    tiny.build("gpt_oss", directory)
    tensors = load_file(directory / "model.safetensors")
    model = tiny.random_model("gpt_oss")
    state = model.state_dict()
    torch.manual_seed(seed)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 125, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        state[name].copy_(convert_moe_packed_tensors(blocks, scales).float())
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        return model(torch.tensor([prompt()])).logits[0]


def test_experts_in_mxfp4_give_the_logits_of_transformers(tmp_path: Path) -> None:
    expected = write(tmp_path)
    model = serve(tmp_path)
    assert isinstance(model, Decoder)
    assert (DenseRunner(model).feed([prompt()]) - expected).abs().max() <= TOLERANCE
    check_checkpoint(checkpoint_of(tmp_path), model.weights)  # it would be taken as an update


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
def test_experts_stay_in_mxfp4_on_a_cpu_and_give_nearly_the_same(tmp_path: Path) -> None:
    expected = write(tmp_path)
    kept, expanded = (serve(tmp_path, dtype="bfloat16", quantization=choice) for choice in ("auto", "none"))
    assert {buffer for buffer, _ in kept.weights.schemes} == {"expert_gate_up", "expert_down"}
    assert kept.weights.nbytes() < expanded.weights.nbytes()
    found, other = (DenseRunner(model).feed([prompt()]) for model in (kept, expanded))
    assert (found - expected).abs().mean() < 0.05
    assert (found - other).abs().mean() < 0.03  # a CPU with VNNI rounds the rows to int8, one with AMX only few rows
