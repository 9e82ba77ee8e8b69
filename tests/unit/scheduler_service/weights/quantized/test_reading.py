"""Quantized checkpoints whose groups fit the CPU kernels are served in the bits that they are stored in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.kernels.cpu.native import build
from quartet.runtime.control import UpdateWeightsFromDisk
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.model.registry import load_model
from quartet.scheduler_service.weights.parameters import Weights
from tests.configs import resolved
from tests.live import Live
from tests.unit.scheduler_service.weights.quantized import test_compressed, test_methods

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

Values = dict[str, torch.Tensor]
GROUP = 32
FOUR = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
ROWS = {"num_bits": 8, "type": "int", "strategy": "channel"}
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("pack-quantized", FOUR),
    "packed with zero points": ("pack-quantized", {**FOUR, "symmetric": False}),
    "int8": ("int-quantized", ROWS),
}
BITS = {"gptq": 4, "awq": 4, "packed": 4, "packed with zero points": 4, "int8": 8}


def write(directory: Path, kind: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> Values:
    if kind in COMPRESSED:
        form, settings = COMPRESSED[kind]
        torch.manual_seed(seed)
        groups = {"group_0": test_compressed.group(settings)}
        return test_compressed.write(directory, form, groups, {"_proj.weight": (form, settings)})
    monkeypatch.setattr(test_methods, "GROUP", GROUP)
    return test_methods.write(directory, kind, seed)


def projections(weights: Weights) -> dict[str, torch.Tensor]:
    """The values of the weights that are kept in few bits, by name."""
    found = {}
    for name, place in weights.layout.places.items():
        if name.endswith("_proj.weight") and (kept := weights.quantized_of(name)) is not None:
            found[name] = kept.values(place.start, place.shape[0])
    return found


def assert_kept(weights: Weights, expected: Values, bits: int) -> None:
    found = projections(weights)
    assert len(found) == 14 and {scheme.bits for scheme in weights.schemes.values()} == {bits}
    for name, values in found.items():
        # scales and offsets are rounded to 11 bits, values to 8
        torch.testing.assert_close(values.float(), expected[name].float(), rtol=1 / 128, atol=2e-3)


@pytest.mark.parametrize("kind", BITS)
def test_a_start_keeps_the_numbers_as_they_are_stored(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(tmp_path, kind, monkeypatch)
    config = resolved(model_path=str(tmp_path), dtype="bfloat16")
    assert_kept(load_model(config, model_info.load(config), torch.device("cpu")).weights, expected, BITS[kind])


@pytest.mark.parametrize("kind", BITS)
def test_an_update_keeps_them_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", kind, monkeypatch)
    live = Live(tmp_path / "a", tmp_path, dtype="bfloat16")
    expected = write(tmp_path / "b", kind, monkeypatch, seed=1)
    reply = live.call(UpdateWeightsFromDisk(model_path=str(tmp_path / "b")))
    assert reply.success, reply.message
    assert_kept(live.worker.model.weights, expected, BITS[kind])


def test_columns_that_the_checkpoint_has_reordered_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "gptq", monkeypatch)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["desc_act"] = True
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = resolved(model_path=str(tmp_path), dtype="bfloat16")
    assert not load_model(config, model_info.load(config), torch.device("cpu")).weights.schemes


def test_numbers_are_expanded_where_the_model_computes_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "gptq", monkeypatch)
    config = resolved(model_path=str(tmp_path), dtype="float32")
    assert not load_model(config, model_info.load(config), torch.device("cpu")).weights.schemes
