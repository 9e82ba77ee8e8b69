"""Checkpoints of bitsandbytes: 4 bits as places in a table, with plain scales and with scales in 8 bits, and int8."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quartet.kernels.cpu.linear import no_pause
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.quantized import reading
from tests import checkpoints

Values = dict[str, torch.Tensor]
PROJECTION = "model.layers.0.self_attn.q_proj"
BLOCK, NESTED_BLOCK, OFFSET = 24, 4, 0.25  # blocks that go on over the ends of rows
STATE = f"{PROJECTION}.weight.quant_state.bitsandbytes__nf4"


def as_bytes(state: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def four_bits(weight: torch.Tensor, nested: bool) -> tuple[Values, torch.Tensor]:
    """Random numbers and scales of the matrix's shape, and what they mean."""
    rows, columns = weight.shape
    count, blocks = rows * columns, -(-rows * columns // BLOCK)
    numbers, table = torch.randint(0, 16, (count,)), torch.linspace(-1, 1, 16)
    parts = {"weight": (numbers[::2] << 4 | numbers[1::2]).to(torch.uint8).unsqueeze(1), "weight.quant_map": table}
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [rows, columns]}
    if nested:
        places, places_map = torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.linspace(-1, 1, 256)
        nested_scales = torch.rand(-(-blocks // NESTED_BLOCK))
        scales = places_map[places.long()] * nested_scales.repeat_interleave(NESTED_BLOCK)[:blocks] + OFFSET
        parts |= {"weight.absmax": places, "weight.nested_quant_map": places_map}
        parts["weight.nested_absmax"] = nested_scales
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_offset": OFFSET, "nested_dtype": "float32"}
    else:
        scales = parts["weight.absmax"] = torch.rand(blocks)
    parts["weight.quant_state.bitsandbytes__nf4"] = as_bytes(state)
    return parts, (table[numbers] * scales.repeat_interleave(BLOCK)[:count]).view(rows, columns)


def eight_bits(weight: torch.Tensor) -> tuple[Values, torch.Tensor]:
    numbers, largest = torch.randint(-127, 128, weight.shape, dtype=torch.int8), torch.rand(len(weight))
    parts = {"weight": numbers, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, numbers.float() * (largest / 127).unsqueeze(1)


def write(directory: Path, form: str) -> Values:
    """A model whose projections are quantized; returns the values of all of its tensors."""
    checkpoints.random_model(directory, 0)
    config = json.loads((directory / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": form != "int8", "load_in_8bit": form == "int8"}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    file = next(directory.glob("*.safetensors"))
    stored, expected = Values(), Values()
    for name, values in load_file(file).items():
        if not name.endswith("_proj.weight"):
            stored[name] = expected[name] = values
            continue
        parts, expected[name] = eight_bits(values) if form == "int8" else four_bits(values, form == "nested")
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(stored, file)
    return expected


@pytest.mark.parametrize("form", ["plain", "nested", "int8"])
def test_the_values_are_read(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(tmp_path, form)
    for _ in range(2):  # the second time a few rows at once
        weights = checkpoints.loaded(tmp_path)
        for name in weights.names():
            torch.testing.assert_close(weights.view(name), expected[name].float(), rtol=0, atol=0)
        monkeypatch.setattr(reading.read_quantized, "__defaults__", (600, no_pause))


ROWS_COLUMNS = {"quant_type": "nf4", "blocksize": BLOCK, "shape": [64, 64]}
DAMAGE: list[tuple[str, torch.Tensor | None, str]] = [
    (f"{PROJECTION}.weight.absmax", None, f"lacks {PROJECTION}.weight.absmax"),
    (f"{PROJECTION}.weight.absmax", torch.ones(3), "weight.absmax has shape [3]"),
    (f"{PROJECTION}.weight", torch.ones(4, 1, dtype=torch.uint8), "weight has shape [4, 1]"),
    (STATE, torch.ones(4), "is F32, not JSON"),
    (STATE, as_bytes({**ROWS_COLUMNS, "shape": [64]}), "length >= 2"),
    (STATE, as_bytes({**ROWS_COLUMNS, "blocksize": 0}), "$.blocksize"),
    (STATE, as_bytes({**ROWS_COLUMNS, "quant_type": "int3"}), "$.quant_type"),
    (STATE, torch.tensor([255, 255], dtype=torch.uint8), "quant_state"),
]


@pytest.mark.parametrize(("name", "value", "said"), DAMAGE)
def test_parts_that_cannot_be_are_refused_by_name(
    name: str, value: torch.Tensor | None, said: str, tmp_path: Path
) -> None:
    write(tmp_path, "plain")
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(name)
    save_file(tensors | ({} if value is None else {name: value}), file)
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        checkpoints.loaded(tmp_path)
    assert PROJECTION in str(caught.value)
