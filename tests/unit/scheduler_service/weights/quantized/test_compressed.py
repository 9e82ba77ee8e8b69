"""Checkpoints of the compressed-tensors library, as it writes and reads them itself."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from quartet.kernels.cpu.linear import no_pause
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.quantized import reading
from tests import checkpoints

Settings = dict[str, Any]
Values = dict[str, torch.Tensor]
PROJECTION = "model.layers.0.self_attn.q_proj"
GROUP4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}
SCHEMES: dict[str, tuple[str, Settings]] = {
    "int4 by group": ("pack-quantized", GROUP4),
    "int4 by group with zero points": ("pack-quantized", {**GROUP4, "symmetric": False}),
    "int4 by row": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int8 packed by group": ("pack-quantized", {**GROUP4, "num_bits": 8}),
    "int8 by row": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 by row with zero points": (
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    ),
    "int8 for all": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}),
    "fp8 by row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 for all": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 by block": ("float-quantized", BLOCKS),
}  # fmt: skip


def scale_shape(rows: int, columns: int, settings: Settings) -> tuple[int, ...]:
    match settings["strategy"]:
        case "group":
            return rows, columns // settings["group_size"]
        case "channel":
            return rows, 1
        case "block":
            return -(-rows // 16), -(-columns // 16)
    return (1,)


def compress(weight: torch.Tensor, form: str, settings: Settings) -> tuple[Values, torch.Tensor]:
    """The library's parts of a matrix, and the values that it reads from them."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    compressor = BaseCompressor.get_value_from_registry(form)
    shape = scale_shape(*weight.shape, settings)
    state = {"weight": weight, "weight_scale": torch.rand(shape) * 0.01 + 0.01}
    if settings.get("symmetric") is False:
        least = -(1 << settings["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(least, -least, shape, dtype=torch.int8)
    stored = compressor.compress(dict(state), scheme)
    read = compressor.decompress(dict(stored), scheme)["weight"]
    return {name: part.contiguous() for name, part in stored.items()}, read


def write(directory: Path, form: str, groups: Settings, of: dict[str, tuple[str, Settings]]) -> Values:
    """A model whose projections are compressed as `of` says of the ends of their names; returns all its values."""
    checkpoints.random_model(directory, 0)
    config = json.loads((directory / "config.json").read_text())
    said = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": groups}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    file = next(directory.glob("*.safetensors"))
    stored, expected = {}, {}
    for name, values in load_file(file).items():
        scheme = next((own for end, own in of.items() if name.endswith(end)), None)
        if scheme is None:
            stored[name] = expected[name] = values
            continue
        parts, expected[name] = compress(values.float(), *scheme)
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(stored, file)
    return expected


def group(settings: Settings, *targets: str) -> Settings:
    return {"targets": list(targets or ("Linear",)), "weights": settings, "input_activations": None}


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Iterator[tuple[str, Settings]]:
    torch.manual_seed(1)
    yield SCHEMES[request.param]


def assert_read(directory: Path, expected: Values) -> None:
    weights = checkpoints.loaded(directory)
    assert sum(name.endswith("_proj.weight") for name in weights.names()) == 14
    for name in weights.names():
        torch.testing.assert_close(weights.view(name), expected[name].float(), rtol=2e-5, atol=2e-6)


def test_what_the_library_wrote_is_read_as_the_library_reads_it(
    tmp_path: Path, scheme: tuple[str, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    form, settings = scheme
    expected = write(tmp_path, form, {"group_0": group(settings)}, {"_proj.weight": scheme})
    assert_read(tmp_path, expected)
    monkeypatch.setattr(reading.read_quantized, "__defaults__", (600, no_pause))  # a few rows at once
    assert_read(tmp_path, expected)


def test_a_module_has_the_settings_of_the_group_that_names_it_best(tmp_path: Path) -> None:
    eight, four, rows = ({**GROUP4, "num_bits": 8}, GROUP4, {**GROUP4, "group_size": 32})
    groups = {
        "group_0": group(four, "Linear"),
        "group_1": group(eight, "re:.*down_proj"),
        "group_2": group(rows, "model.layers.1.mlp.down_proj"),
    }
    of = {
        "1.mlp.down_proj.weight": ("pack-quantized", rows),
        "down_proj.weight": ("pack-quantized", eight),
        "_proj.weight": ("pack-quantized", four),
    }
    assert_read(tmp_path, write(tmp_path, "mixed-precision", groups, of))


def test_columns_whose_groups_are_not_side_by_side_are_put_in_their_order(tmp_path: Path) -> None:
    expected = write(tmp_path, "pack-quantized", {"g": group(GROUP4)}, {"_proj.weight": ("pack-quantized", GROUP4)})
    file = next(tmp_path.glob("*.safetensors"))
    stored = load_file(file)
    columns = expected[f"{PROJECTION}.weight"].shape[1]
    order = torch.randperm(columns)
    group_of = (torch.arange(columns) // 16)[torch.argsort(order)]
    sorted_columns = torch.argsort(group_of, stable=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**GROUP4))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    values = torch.randn(expected[f"{PROJECTION}.weight"].shape)
    scales = stored[f"{PROJECTION}.weight_scale"]
    grouped = {"weight": values[:, sorted_columns], "weight_scale": scales}
    numbers = compressor.decompress(dict(compressor.compress(grouped, scheme)), scheme)["weight"]
    meant = torch.empty_like(numbers)
    meant[:, sorted_columns] = numbers
    # the file holds the columns in the model's order, each with the group that its scale is in
    in_order = torch.empty_like(meant, dtype=torch.int8)
    in_order[:] = (meant / scales[:, group_of]).round()
    stored[f"{PROJECTION}.weight_packed"] = pack_to_int32(in_order, 4)
    stored[f"{PROJECTION}.weight_g_idx"] = group_of.int()
    save_file(stored, file)
    assert_read(tmp_path, expected | {f"{PROJECTION}.weight": meant})


DAMAGE = [
    ("weight_scale", None, f"lacks {PROJECTION}.weight_scale"),
    ("weight_scale", torch.ones(2, 2), r"weight_scale has shape \[2, 2\]"),
    ("weight_scale", torch.ones(64, 3), "quantization_config says group_size 16"),
    ("weight_packed", torch.ones(4), "is F32"),
    ("weight_g_idx", torch.full((64,), 99, dtype=torch.int32), "a column belongs to a group that is not one"),
    ("weight_g_idx", torch.zeros(3, dtype=torch.int32), r"weight_g_idx has shape \[3\]"),
]


@pytest.mark.parametrize(("part", "value", "said"), DAMAGE)
def test_parts_that_do_not_fit_are_refused_by_name(
    part: str, value: torch.Tensor | None, said: str, tmp_path: Path
) -> None:
    write(tmp_path, "pack-quantized", {"g": group(GROUP4)}, {"_proj.weight": ("pack-quantized", GROUP4)})
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(f"{PROJECTION}.{part}", None)
    save_file(tensors | ({} if value is None else {f"{PROJECTION}.{part}": value}), file)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoints.loaded(tmp_path)
    assert PROJECTION in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "marlin-24"}, "format is 'marlin-24'; what is read is 'pack-quantized'"),
        ({"config_groups": {}}, "config_groups is {}"),
        ({"config_groups": {"g": group(GROUP4, "other.module")}}, "no group of config_groups has settings for"),
        ({"config_groups": {"g": group(GROUP4, "re:(")}}, "is no pattern"),
        ({"config_groups": {"g": group(GROUP4, "re:\ud800")}}, "is no pattern"),
        ({"config_groups": {"g": group({**GROUP4, "num_bits": 3})}}, "num_bits is 3; what is read is 4, 8"),
        ({"config_groups": {"g": group({**GROUP4, "group_size": 0})}}, "group_size 0"),
        ({"config_groups": {"g": {**group(GROUP4), "format": "nvfp4-pack-quantized"}}}, "nvfp4-pack-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights are not read"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_name(change: Settings, said: str, tmp_path: Path) -> None:
    write(tmp_path, "pack-quantized", {"g": group(GROUP4)}, {"_proj.weight": ("pack-quantized", GROUP4)})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        checkpoint_of(tmp_path)


def test_a_pattern_that_would_take_others_for_ever_is_matched_at_once(tmp_path: Path) -> None:
    groups = {"g": group(GROUP4, "re:(.*.*)*(.*.*)*x$"), "h": group(GROUP4)}
    assert_read(tmp_path, write(tmp_path, "pack-quantized", groups, {"_proj.weight": ("pack-quantized", GROUP4)}))
