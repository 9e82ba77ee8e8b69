"""Checkpoints as torchao writes them. Its library is not needed: what it stores and means is written down here.

Compared once with torchao 0.18 itself: `Int8WeightOnlyConfig`, `IntxWeightOnlyConfig` (int4 by group, with and without
zero points) and `Float8WeightOnlyConfig` gave the values of its own `dequantize`, rounded to bfloat16.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.formats import checkpoint_of
from tests import checkpoints

Tensors = dict[str, torch.Tensor]
PROJECTION = "model.layers.0.self_attn.q_proj"
GROUP = 16


def parts_of(weight: torch.Tensor, kind: str) -> tuple[Tensors, torch.Tensor]:
    """The stored parts of a weight (rows, columns) by their endings, and the values that they mean."""
    rows, columns = weight.shape
    if kind == "Float8Tensor":
        scale = torch.rand(rows, 1) + 0.5
        numbers = (weight / scale).to(torch.float8_e4m3fn)
        return {"qdata": numbers, "scale": scale}, numbers.float() * scale
    group = columns if kind == "Int8Tensor" else GROUP
    low, high = (-128, 127) if kind == "Int8Tensor" else (-8, 7)
    numbers = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(rows, columns // group) * 0.01).bfloat16()
    zeros = torch.randint(low, high + 1, scale.shape, dtype=torch.int8)
    wide_scale, wide_zeros = (part.float().repeat_interleave(group, 1) for part in (scale, zeros))
    return {"qdata": numbers, "scale": scale, "zero_point": zeros}, (numbers - wide_zeros) * wide_scale


def write(directory: Path, kind: str, **changes: torch.Tensor | None) -> Tensors:
    """A model whose projections are quantized; returns the values of all tensors. `changes`: parts of one of them."""
    checkpoints.random_model(directory, 0)
    config = json.loads((directory / "config.json").read_text())
    settings = {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_data": {}}}}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    file = next(directory.glob("*.safetensors"))
    stored, expected = Tensors(), Tensors()
    for name, values in load_file(file).items():
        if not name.endswith("_proj.weight"):
            stored[name] = expected[name] = values
            continue
        place = name.removesuffix(".weight")
        parts, expected[name] = parts_of(values.float(), kind)
        parts |= changes if place == PROJECTION else {}
        stored |= {f"{place}._weight_{part}": value for part, value in parts.items() if value is not None}
    save_file(stored, file)
    return expected


@pytest.mark.parametrize("kind", ["Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"])
def test_the_values_of_a_checkpoint_are_read(kind, tmp_path):
    expected = write(tmp_path, kind)
    weights = checkpoints.loaded(tmp_path)
    for name in weights.names():
        torch.testing.assert_close(weights.view(name), expected[name].float(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qdata": torch.zeros(64, 32, dtype=torch.uint8)}, r"is a kind of tensor that is not read \(U8 \[64, 32\]\)"),
        ({"zero_point": torch.zeros(64, 1)}, r"not read \(zero points in F32\)"),
        ({"act_pre_scale": torch.ones(1)}, "activations are scaled before"),
        ({"scale": torch.ones(3, 1)}, r"_weight_scale has shape \[3, 1\]"),
        ({"zero_point": torch.zeros(64, 2, dtype=torch.int8)}, r"_weight_zero_point has shape \[64, 2\]"),
        ({"scale": None}, "lacks .*_weight_scale"),
    ],
)
def test_parts_that_are_not_read_or_do_not_fit_are_refused_with_the_name_of_the_tensor(changes, said, tmp_path):
    write(tmp_path, "Int8Tensor", **changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoint_of(tmp_path)
    assert PROJECTION in str(caught.value)
