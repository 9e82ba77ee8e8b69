"""The experts of gpt-oss, in MXFP4 or plain, become one tensor each, with the values that transformers reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quartet.kernels.cpu.native import build
from quartet.scheduler_service.weights import load, storage
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.parameters import Layout, Weights
from quartet.scheduler_service.weights.quantized import reading

EXPERTS, SIZE, HIDDEN = 3, 32, 64
PLACE = "model.layers.0.mlp.experts"
CPU = torch.device("cpu")

Tensors = dict[str, torch.Tensor]


def stored_tensors() -> Tensors:
    """All experts of a layer as gpt-oss has them: every code, exponents around those of real weights."""
    torch.manual_seed(0)
    found = Tensors()
    for own, rows, columns in (("gate_up_proj", 2 * SIZE, HIDDEN), ("down_proj", HIDDEN, SIZE)):
        groups = columns // 32
        found[f"{own}_blocks"] = torch.randint(0, 256, (EXPERTS, rows, groups, 16), dtype=torch.uint8)
        found[f"{own}_scales"] = torch.randint(110, 130, (EXPERTS, rows, groups), dtype=torch.uint8)
        found[f"{own}_bias"] = torch.randn(EXPERTS, rows).bfloat16()
    return found


def plain(tensors: Tensors) -> Tensors:
    """The same as transformers expands it: (experts, columns, rows)."""
    found = {name: tensor for name, tensor in tensors.items() if name.endswith("_bias")}
    for own in ("gate_up_proj", "down_proj"):
        found[own] = convert_moe_packed_tensors(tensors[f"{own}_blocks"], tensors[f"{own}_scales"])
    return found


def write(directory: Path, tensors: Tensors, method: str | None = "mxfp4") -> None:
    settings = {"quantization_config": {"quant_method": method}} if method else {}
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt_oss", **settings}))
    save_file({f"{PLACE}.{name}": tensor for name, tensor in tensors.items()}, directory / "model.safetensors")


def layout() -> Layout:
    """Places for the experts, gate above up."""
    made = Layout()
    for expert in range(EXPERTS):
        inside, index = f"{PLACE}.{expert}", (0, expert)
        both = [(f"{inside}.{name}_proj", SIZE) for name in ("gate", "up")]
        made.add("expert_gate_up", index, [(f"{name}.weight", rows) for name, rows in both], HIDDEN)
        made.add("expert_gate_up_bias", index, [(f"{name}.bias", rows) for name, rows in both], None)
        made.add("expert_down", index, [(f"{inside}.down_proj.weight", HIDDEN)], SIZE)
        made.add("expert_down_bias", index, [(f"{inside}.down_proj.bias", HIDDEN)], None)
    return made


def loaded(directory: Path, quantization: str = "none") -> Weights:
    """The weights of a directory, read by `quantization`."""
    checkpoint, places = checkpoint_of(directory), layout()
    schemes = storage.schemes_of(quantization, places, torch.bfloat16, CPU, checkpoint)
    weights = Weights(places, torch.bfloat16, CPU, schemes)
    load.check_tensors(checkpoint, weights)
    load.read_weights(checkpoint, weights, checkpoint.files)
    return weights


def expected(tensors: Tensors) -> Tensors:
    """By name in the model."""
    own, found = plain(tensors), Tensors()
    for expert in range(EXPERTS):
        for place, name in enumerate(("gate_proj", "up_proj")):
            found[f"{PLACE}.{expert}.{name}.weight"] = own["gate_up_proj"][expert, :, place::2].T
            found[f"{PLACE}.{expert}.{name}.bias"] = own["gate_up_proj_bias"][expert, place::2]
        found[f"{PLACE}.{expert}.down_proj.weight"] = own["down_proj"][expert].T
        found[f"{PLACE}.{expert}.down_proj.bias"] = own["down_proj_bias"][expert]
    return found


@pytest.mark.parametrize("form", ["mxfp4", "plain"])
def test_every_expert_gets_the_values_that_transformers_reads(form, tmp_path, monkeypatch):
    tensors = stored_tensors()
    write(tmp_path, tensors if form == "mxfp4" else plain(tensors), "mxfp4" if form == "mxfp4" else None)
    monkeypatch.setattr(reading.read_quantized, "__defaults__", (600, reading.no_pause))  # a few rows at once
    weights = loaded(tmp_path)
    assert expected(tensors).keys() == weights.names().keys()
    for name, values in expected(tensors).items():
        assert torch.equal(weights.view(name), values), name


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
def test_the_numbers_stay_as_they_are_in_five_bits_without_rounding(tmp_path):
    tensors = stored_tensors()
    write(tmp_path, tensors)
    weights = loaded(tmp_path, "auto")
    assert {scheme.bits for scheme in weights.schemes.values()} == {5}
    assert {buffer for buffer, _ in weights.schemes} == {"expert_gate_up", "expert_down"}
    for name, values in expected(tensors).items():
        assert torch.equal(weights.view(name), values), name


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("down_proj_scales", None, "lacks .*down_proj_scales"),
        ("down_proj_scales", torch.ones(EXPERTS, HIDDEN, 2, dtype=torch.uint8), r"needs? \[3, 64, 1\]"),
        ("down_proj_blocks", torch.ones(EXPERTS, HIDDEN, 1, 8, dtype=torch.uint8), r"need \[3, 64, 1, 16\]"),
        ("gate_up_proj_blocks", torch.ones(EXPERTS, 2 * SIZE, 2, 16), "is F32"),
        ("gate_up_proj_bias", torch.ones(EXPERTS, 2 * SIZE + 1), "65 rows cannot be divided among 2"),
        ("down_proj_bias", torch.ones(4097, 2), "has 4097 experts"),
        ("down_proj_bias", None, "lacks .*down_proj_bias"),
        ("down_proj_scales", torch.full((EXPERTS, HIDDEN, 1), 255, dtype=torch.uint8), "not finite"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_name_of_the_tensor(name, value, said, tmp_path):
    tensors = stored_tensors()
    del tensors[name]
    write(tmp_path, tensors if value is None else tensors | {name: value})
    with pytest.raises(CheckpointError, match=said) as caught:
        loaded(tmp_path)
    assert PLACE in str(caught.value)
