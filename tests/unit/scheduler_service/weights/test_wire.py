"""Payloads of tensors: written as plain ones, and compared with checksums."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quartet.scheduler_service.weights import wire
from quartet.scheduler_service.weights.checkpoint import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    wire.write_plain(TENSORS.items(), tmp_path / "plain")
    return tmp_path / "plain"


def test_tensors_are_written_as_safetensors(file: Path) -> None:
    for found in (load_file(file), dict(wire.named_tensors(file))):
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor a is there twice"):
        wire.write_plain([*TENSORS.items(), ("a", torch.ones(1))], tmp_path / "plain")


def test_a_bucket_of_more_tensors_than_are_taken_is_refused(tmp_path: Path) -> None:
    entries = [{"name": str(i), "shape": [1], "dtype": "uint8", "start_idx": i, "end_idx": i + 1} for i in range(9)]
    flat = {"flattened_tensor": torch.zeros(9, dtype=torch.uint8)}
    save_file(flat, tmp_path / "bucket", {"metadata": json.dumps(entries)})
    with pytest.raises(CheckpointError, match="more than 8 tensors"):
        list(wire.bucket_tensors(tmp_path / "bucket", 8))


def test_checksums_are_of_the_bytes_of_each_tensor(file: Path) -> None:
    right = hashlib.sha256(TENSORS["a"].numpy().tobytes()).hexdigest()
    wire.check_checksums(file, {})
    wire.check_checksums(file, {"a": right.upper()})
    with pytest.raises(CheckpointError, match="tensor a has another SHA-256 than expected_checksums says"):
        wire.check_checksums(file, {"a": right[:-1] + "x"})
    with pytest.raises(CheckpointError, match="names the tensor c, which was not sent"):
        wire.check_checksums(file, {"c": right})
