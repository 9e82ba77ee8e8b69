"""Checkpoints of torch.save: their tensors serve, and what else such a file may hold does nothing here."""

import gc
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quartet.runtime.control import UpdateWeightsFromDisk
from quartet.scheduler_service.weights import pickled, record
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.convert_bin import Refused, plain_tensors
from quartet.scheduler_service.weights.manifest import manifest_of
from quartet.scheduler_service.weights.pickled import INDEX_NAME, SINGLE_NAME, checkpoint_of
from tests import checkpoints
from tests.engine import Engine
from tests.live import Live

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = [5, 6, 7]


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    pickled.forget_converted()
    before = descriptors()
    yield
    pickled.forget_converted()
    gc.collect()  # an exception keeps what its frames held
    assert descriptors() <= before
    assert not list(Path(tempfile.gettempdir()).glob("quartet-bin-*"))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def as_bin(source: Path, directory: Path, shards: int = 1, legacy: bool = False) -> Path:
    """The same model with its weights as torch.save writes them."""
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save: dict[str, Any] = {"_use_new_zipfile_serialization": not legacy}
    if shards == 1:
        torch.save(tensors, directory / SINGLE_NAME, **save)
        return directory
    weight_map = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, directory / file, **save)
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def served(directory: Path) -> dict[str, torch.Tensor]:
    weights = Engine(directory).worker.model.weights
    return {name: weights.view(name) for name in weights.names()}


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (3, False), (1, True)])
def test_the_tensors_of_a_pickled_checkpoint_serve(
    tmp_path: Path, shards: int, legacy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source = checkpoints.random_model(tmp_path / "source", seed=1)
    directory = as_bin(source, tmp_path / "bin", shards, legacy)
    with caplog.at_level(logging.INFO):
        found = served(directory)
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(source / "model.safetensors").items())
    assert "has no safetensors files. Its pickled *.bin files are read by a separate process" in caplog.text
    assert "Using model weights format ['*.bin']" in caplog.text


def test_safetensors_files_beside_them_are_preferred(tmp_path: Path) -> None:
    directory = checkpoints.random_model(tmp_path / "model", seed=1)
    (directory / SINGLE_NAME).write_bytes(b"no pickle at all")
    assert HEAD in served(directory)


def test_tensors_that_share_their_bytes_or_lie_across_are_written_out(tmp_path: Path) -> None:
    source = checkpoints.random_model(tmp_path / "source", seed=1)
    tensors = load_file(source / "model.safetensors")
    tensors[HEAD] = tensors[EMBED]
    across = "model.layers.0.self_attn.q_proj.weight"
    tensors[across] = tensors[across].t().contiguous().t()
    directory = checkpoints.write_config(tmp_path / "bin")
    torch.save(tensors, directory / SINGLE_NAME)
    found = served(directory)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_an_update_from_pickled_files_is_as_good_as_another(tmp_path: Path) -> None:
    live = Live(checkpoints.version_model(tmp_path / "a", 100), tmp_path)
    source = checkpoints.version_model(tmp_path / "b", 200)
    directory = as_bin(source, tmp_path / "bin", shards=2)
    reply = live.call(UpdateWeightsFromDisk(model_path=str(directory), manifest=manifest_of(source)))
    assert reply.success, reply.message
    weights = live.worker.model.weights
    assert torch.equal(weights.view(HEAD), load_file(source / "model.safetensors")[HEAD])
    assert set(live.updates.committed.files) == {file.name for file in directory.glob("*.bin")}
    assert live.updates.committed.files == record.files_of(directory)


def test_a_server_that_wants_safetensors_alone_refuses_them(tmp_path: Path) -> None:
    source = checkpoints.random_model(tmp_path / "source", seed=1)
    directory = as_bin(source, tmp_path / "bin")
    with pytest.raises(CheckpointError, match=r"pickled \*\.bin files only"):
        Engine(directory, load_format="safetensors")
    reply = Live(source, tmp_path).call(UpdateWeightsFromDisk(model_path=str(directory), load_format="safetensors"))
    assert reply.status == 400 and "choose auto" in reply.message


def test_a_broken_update_from_pickled_files_changes_nothing(tmp_path: Path) -> None:
    live = Live(checkpoints.random_model(tmp_path / "a", seed=1), tmp_path)
    before = live.worker.model.weights.checksum(HEAD)
    directory = as_bin(checkpoints.random_model(tmp_path / "b", seed=2), tmp_path / "bin")
    torch.save({HEAD: torch.ones(2, 3)}, directory / SINGLE_NAME)
    reply = live.call(UpdateWeightsFromDisk(model_path=str(directory)))
    assert reply.status == 400 and "the checkpoint lacks" in reply.message
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    torch.save({**tensors, HEAD: torch.ones(2, 3)}, directory / SINGLE_NAME)
    reply = live.call(UpdateWeightsFromDisk(model_path=str(directory)))
    assert reply.status == 400 and f"{directory / SINGLE_NAME}: tensor {HEAD} has shape [2, 3]" in reply.message
    assert live.worker.model.weights.checksum(HEAD) == before


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


HOSTILE: list[tuple[Any, str]] = [
    ({"a": torch.zeros(1).expand(1 << 40)}, "far more than the file"),
    ({"state_dict": {"a": torch.ones(2)}}, "state_dict is no plain tensor"),
    ([torch.ones(2)], "does not hold tensors by name"),
    ({}, "does not hold tensors by name"),
    ({"a": 5}, "a is no plain tensor"),
    ({"a": torch.ones(3, 3).to_sparse()}, "a is no plain tensor"),
    ({"a": torch.ones(3, device="meta")}, "a is no plain tensor"),
    ({"a": torch.ones(3, dtype=torch.complex64)}, "which is not supported"),
    ({5: torch.ones(3)}, "5 is no name of a tensor"),
    ({"n" * 100_000: torch.ones(3)}, "is no name of a tensor"),
    ({"a": torch.ones([1] * 20)}, "20 dimensions"),
]


@pytest.mark.parametrize(("state", "said"), HOSTILE, ids=[said for _, said in HOSTILE])
def test_what_is_no_set_of_plain_tensors_is_refused(state: Any, said: str) -> None:
    with pytest.raises(Refused, match=said) as refusal:
        plain_tensors(state, most_bytes=1 << 20)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("legacy", [False, True])
def test_a_program_in_a_pickle_is_refused_and_not_carried_out(legacy: bool, tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": Malicious(tmp_path / "done")}
    torch.save(state, tmp_path / SINGLE_NAME, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"cannot read .*\.bin: ") as refusal:
        checkpoint_of(tmp_path)
    assert not (tmp_path / "done").exists()
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 700


@pytest.mark.parametrize("content", [b"", b"\x80\x02" + b"(" * 1_000_000])
def test_what_is_no_file_of_torch_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"cannot read .*{SINGLE_NAME}"):
        checkpoint_of(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / SINGLE_NAME)
    os.truncate(tmp_path / SINGLE_NAME, 2000)
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint_of(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE_NAME)
    with pytest.raises(CheckpointError, match="it is no regular file"):
        checkpoint_of(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "../pytorch_model-1.bin"}, "which is not a bin file beside it"),
        ({"a": "model.safetensors"}, "which is not a bin file beside it"),
        ({"b": "pytorch_model-1.bin"}, "says that b is in pytorch_model-1.bin, which does not hold it"),
        ({"a": "pytorch_model-2.bin"}, "No such file"),
    ],
)
def test_a_wrong_index_is_refused(weight_map: dict[str, str], said: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model-1.bin")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=said):
        checkpoint_of(tmp_path)


@pytest.mark.slow
def test_a_file_is_converted_once_for_all_who_look_at_it_and_again_when_it_has_changed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / SINGLE_NAME)
    first = checkpoint_of(tmp_path)
    assert checkpoint_of(tmp_path) is first
    torch.save({"a": torch.ones(4)}, tmp_path / SINGLE_NAME)
    assert checkpoint_of(tmp_path).tensors["a"].shape == (4,)
