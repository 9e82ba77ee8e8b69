"""Parallel staging with chunks that are not page-locked, onto a "device" that is the CPU."""

import threading
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError
from quartet.scheduler_service.weights.device_staging import changed_tensors, read_to_device
from quartet.scheduler_service.weights.parameters import Layout, Weights

CPU = torch.device("cpu")
CHUNK = 64  # bytes: every tensor takes several


def weights(dtype: torch.dtype = torch.float32) -> Weights:
    layout = Layout()
    for layer in range(3):
        layout.add("qk", (layer,), [(f"layers.{layer}.q", 10), (f"layers.{layer}.k", 6)], 12)
    layout.add("norm", (), [("norm", 7)], None)
    made = Weights(layout, dtype, CPU)
    for buffer in made.buffers.values():
        buffer.fill_(-1)
    return made


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {**{name: shape for name, (shape, _) in weights().names().items()}, "ignored": (5, 9)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def stored(directory: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint.open(directory)


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tensors_arrive_in_their_places_whatever_thread_read_them(tmp_path, tensors, threads, dtype):
    target = weights(dtype)
    read_to_device(stored(tmp_path, tensors), list(target.names()), target, threads=threads, chunk_bytes=CHUNK)
    assert all(torch.equal(target.view(name), tensors[name].to(dtype)) for name in target.names())


def test_every_tensor_is_hashed_on_its_way_and_those_without_a_place_too(tmp_path, tensors):
    found, lock = {}, threading.Lock()

    def note(name: str, digest: str) -> None:
        with lock:
            found[name] = digest

    read_to_device(stored(tmp_path, tensors), list(tensors), weights(), note, threads=3, chunk_bytes=CHUNK)
    assert found == {name: xxhash.xxh3_64_hexdigest(x.numpy().tobytes()) for name, x in tensors.items()}


def test_a_digest_that_is_refused_ends_the_reading(tmp_path, tensors):
    def refuse(name: str, digest: str) -> None:
        raise CheckpointError(f"{name} has the digest {digest}")

    with pytest.raises(CheckpointError, match="has the digest"):
        read_to_device(stored(tmp_path, tensors), list(tensors), weights(), refuse, threads=3, chunk_bytes=CHUNK)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_found(tmp_path, tensors, bad):
    tensors["layers.1.k"][3, 4] = bad
    with pytest.raises(CheckpointError, match="k holds values that are not finite"):
        read_to_device(stored(tmp_path, tensors), list(weights().names()), weights(), threads=2, chunk_bytes=CHUNK)


def test_a_truncated_file_is_refused(tmp_path, tensors):
    checkpoint = stored(tmp_path, tensors)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(900)
    with pytest.raises(CheckpointError, match="truncated while it was read"):
        read_to_device(checkpoint, list(weights().names()), weights(), threads=2, chunk_bytes=CHUNK)


def test_only_tensors_whose_bits_differ_are_called_changed(tmp_path, tensors):
    live, staged = weights(), weights()
    assert changed_tensors(live, staged, list(live.names())) == frozenset()
    staged.view("layers.2.k")[0, 0] = 5.0
    staged.view("norm")[1] = torch.nan
    assert changed_tensors(live, staged, list(live.names())) == {"layers.2.k", "norm"}
    live.view("norm")[1] = torch.nan
    assert changed_tensors(live, staged, list(live.names())) == {"layers.2.k"}
