"""Checkpoints as torchao writes them. Its library is not needed: what it stores and means is written down here.

Compared once with torchao 0.18 itself: `Int8WeightOnlyConfig`, `IntxWeightOnlyConfig` (int4 by group, with and without
zero points) and `Float8WeightOnlyConfig` gave the values of its own `dequantize`, rounded to bfloat16. Its two kinds of
int4 by group are made on a GPU only: Int4Tensor is packed here as `pack_int4` of fbgemm does, Int4TilePackedTo4dTensor
as the kernel `matrix_to_m16n8k16_Bint4_layout` of PyTorch.
"""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.formats import checkpoint_of
from tests import checkpoints

Tensors = dict[str, torch.Tensor]
PROJECTION = "model.layers.0.self_attn.q_proj"
GROUP = 16
TILE = (8, 128)  # rows and columns
KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "Int4Tensor", "Int4TilePackedTo4dTensor")


def parts_of(weight: torch.Tensor, kind: str) -> tuple[Tensors, torch.Tensor]:
    """The stored parts of a weight (rows, columns) by their endings, and the values that they mean."""
    rows, columns = weight.shape
    if kind == "Float8Tensor":
        scale = torch.rand(rows, 1) + 0.5
        numbers = (weight / scale).to(torch.float8_e4m3fn)
        return {"qdata": numbers, "scale": scale}, numbers.float() * scale
    if kind.startswith("Int4"):
        return int4_parts(weight, kind == "Int4Tensor")
    group = columns if kind == "Int8Tensor" else GROUP
    low, high = (-128, 127) if kind == "Int8Tensor" else (-8, 7)
    numbers = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(rows, columns // group) * 0.01).bfloat16()
    zeros = torch.randint(low, high + 1, scale.shape, dtype=torch.int8)
    wide_scale, wide_zeros = (part.float().repeat_interleave(group, 1) for part in (scale, zeros))
    return {"qdata": numbers, "scale": scale, "zero_point": zeros}, (numbers - wide_zeros) * wide_scale


def int4_parts(weight: torch.Tensor, plain: bool) -> tuple[Tensors, torch.Tensor]:
    """The same for numbers of 4 bits: two in a byte, or in tiles."""
    rows, columns = weight.shape
    numbers = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scale, zero = ((torch.rand(columns // GROUP, rows) * 0.01).bfloat16() for _ in range(2))
    wide_scale, wide_zero = (part.float().T.repeat_interleave(GROUP, 1) for part in (scale, zero))
    expected = numbers * wide_scale + wide_zero
    if plain:
        packed = numbers[:, ::2] & 15 | numbers[:, 1::2] << 4
        return {"qdata": packed, "scale": scale, "zero_point": zero}, expected
    more = -rows % TILE[0], -columns % TILE[1]
    filled = F.pad(numbers.int() + 8, (0, more[1], 0, more[0]))
    both = F.pad(torch.stack((scale, zero), 2), (0, 0, 0, more[0], 0, more[1] // GROUP))
    return {"qdata": in_tiles(filled), "scale_and_zero": both}, expected


def in_tiles(numbers: torch.Tensor) -> torch.Tensor:
    """(rows, columns) int32 from 0 to 15 → (rows / 8, columns / 128, 32, 4) int32, word by word as the kernel does."""
    tiles = torch.empty(len(numbers) // TILE[0], numbers.shape[1] // TILE[1], 32, 4, dtype=torch.int32)
    lane = torch.arange(32)
    for tile, step, pair in product(range(tiles.shape[0]), range(tiles.shape[1]), range(4)):
        first = (step * 8 + 2 * pair) * 16 + lane % 4 * 2
        columns = [first + more for more in (0, 8, 16, 24, 1, 9, 17, 25)]  # v[0] v[2] v[4] v[6] v[1] v[3] v[5] v[7]
        nibbles = torch.stack([numbers[tile * 8 + lane // 4, column] for column in columns], 1).numpy().astype("uint32")
        tiles[tile, step, :, pair] = torch.from_numpy((nibbles << range(0, 32, 4)).sum(1, dtype="uint32").view("int32"))
    return tiles


def write(directory: Path, kind: str, **changes: torch.Tensor | None) -> Tensors:
    """A model whose projections are quantized; returns the values of all tensors. `changes`: parts of one of them."""
    checkpoints.random_model(directory, 0)
    config = json.loads((directory / "config.json").read_text())
    settings = {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_data": {}}}}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    file = next(directory.glob("*.safetensors"))
    stored, expected, metadata = Tensors(), Tensors(), dict[str, str]()
    for name, values in load_file(file).items():
        if not name.endswith("_proj.weight"):
            stored[name] = expected[name] = values
            continue
        place = name.removesuffix(".weight")
        parts, expected[name] = parts_of(values.float(), kind)
        parts |= changes if place == PROJECTION else {}
        stored |= {f"{place}._weight_{part}": value for part, value in parts.items() if value is not None}
        metadata[name] = json.dumps({"_type": kind, "_data": {"block_size": [1, GROUP], "shape": list(values.shape)}})
    save_file(stored, file, metadata)
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_of_a_checkpoint_are_read(kind, tmp_path):
    expected = write(tmp_path, kind)
    weights = checkpoints.loaded(tmp_path)
    for name in weights.names():
        torch.testing.assert_close(weights.view(name), expected[name].float(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qdata": torch.zeros(64, 32, dtype=torch.uint8)}, r"is a kind of tensor that is not read \(U8 \[64, 32\]\)"),
        ({"zero_point": torch.zeros(64, 1, dtype=torch.int32)}, r"not read \(zero points in I32\)"),
        ({"zero_point": torch.zeros(64, 1)}, r"_weight_scale has shape \[64, 1\], its other parts need \[64, 64\]"),
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qdata": torch.zeros(8, 1, 32, 3, dtype=torch.int32)}, r"_weight_scale_and_zero has shape"),
        ({"qdata": torch.zeros(7, 1, 32, 4, dtype=torch.int32)}, r"_weight_qdata has shape \[7, 1, 32, 4\]"),
        ({"qdata": torch.zeros(8, 4, 32, dtype=torch.int32)}, "which cannot be"),
        ({"scale_and_zero": torch.zeros(8, 64, 1, dtype=torch.bfloat16)}, r"its other parts need \[8, 64, 2\]"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_with_the_name_of_the_tensor(changes, said, tmp_path):
    write(tmp_path, "Int4TilePackedTo4dTensor", **changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoint_of(tmp_path)
    assert PROJECTION in str(caught.value)


def test_tiles_without_their_shape_in_the_metadata_are_refused(tmp_path):
    write(tmp_path, "Int4TilePackedTo4dTensor")
    file = next(tmp_path.glob("*.safetensors"))
    save_file(load_file(file), file)
    with pytest.raises(CheckpointError, match="its metadata do not give the shape of"):
        checkpoint_of(tmp_path)
