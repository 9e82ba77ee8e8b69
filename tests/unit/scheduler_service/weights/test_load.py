"""Reading checkpoints: what is read, and how each kind of damage is reported."""

import contextlib
import json
import logging
import os
import socket
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.runtime.process.memory import Memory
from quartet.scheduler_service.model.layers import linear
from quartet.scheduler_service.weights import checkpoint as checkpoints
from quartet.scheduler_service.weights import load, progress
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError
from quartet.scheduler_service.weights.parameters import Layout, Weights
from quartet.scheduler_service.weights.tensor_io import read_chunks
from tests.configs import resolved

Header = dict[str, Any]
CPU = torch.device("cpu")


def fused_weights(dtype: torch.dtype = torch.float32) -> Weights:
    """Two layers of q and k in one matrix, and a norm."""
    layout = Layout(ignored=frozenset({"rotary.inv_freq"}))
    for layer in range(2):
        layout.add("qk", (layer,), [(f"layers.{layer}.q", 4), (f"layers.{layer}.k", 2)], 3)
    layout.add("norm", (), [("norm", 3)], None)
    weights = Weights(layout, dtype, CPU)
    for buffer in weights.buffers.values():
        buffer.fill_(-1)
    return weights


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, (shape, _) in fused_weights().names().items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def fill(directory: Path, weights: Weights) -> Weights:
    checkpoint = Checkpoint.open(directory)
    load.check_tensors(checkpoint, weights)
    load.read_weights(checkpoint, weights, checkpoint.files)
    return weights


def write_raw(path: Path, header: Header | bytes, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_shards(directory: Path, parts: list[dict[str, torch.Tensor]]) -> None:
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / checkpoints.INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_fused_rows_receive_their_tensors(tmp_path: Path) -> None:
    stored = tensors()
    save_file(stored, tmp_path / "model.safetensors")
    weights = fill(tmp_path, fused_weights())
    assert torch.equal(weights.slab("qk", 1), torch.cat((stored["layers.1.q"], stored["layers.1.k"])))
    assert all(torch.equal(weights.view(name), tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_converted_while_copying(source: torch.dtype, target: torch.dtype, tmp_path: Path) -> None:
    stored = tensors(source)
    save_file(stored, tmp_path / "model.safetensors")
    weights = fill(tmp_path, fused_weights(target))
    assert all(torch.equal(weights.view(name), tensor.to(target)) for name, tensor in stored.items())


def test_conversion_goes_chunk_by_chunk(tmp_path: Path) -> None:
    stored = torch.randn(7, 5)
    save_file({"a": stored}, tmp_path / "model.safetensors")
    target = torch.empty(7, 5, dtype=torch.bfloat16)
    with (tmp_path / "model.safetensors").open("rb") as file:
        place = Checkpoint.open(tmp_path).tensors["a"]
        chunks = [len(values) for values, _ in read_chunks(place, target, file.fileno(), chunk_bytes=16)]
    assert chunks == [4] * 8 + [3]
    assert torch.equal(target, stored.bfloat16())


def test_shards_of_an_index_are_read_and_stray_files_are_not(tmp_path: Path) -> None:
    stored = tensors()
    names = sorted(stored)
    write_shards(tmp_path, [{name: stored[name] for name in part} for part in (names[:2], names[2:])])
    save_file({"norm": torch.zeros(7)}, tmp_path / "consolidated.safetensors")
    weights = fill(tmp_path, fused_weights())
    assert all(torch.equal(weights.view(name), tensor) for name, tensor in stored.items())


def test_tensors_nobody_needs_are_named_and_those_expected_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(
        {**tensors(), "vision.patch": torch.ones(2), "rotary.inv_freq": torch.ones(2)}, tmp_path / "a.safetensors"
    )
    with caplog.at_level(logging.WARNING):
        fill(tmp_path, fused_weights())
    assert [record.getMessage() for record in caplog.records] == [
        "The model has no use for 1 tensor: vision.patch of the checkpoint."
    ]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layers.1.k": None}, "lacks 1 tensor: layers.1.k"),
        ({"layers.1.k": torch.ones(3, 2)}, r"tensor layers\.1\.k has shape \[3, 2\], the model needs \[2, 3\]"),
        ({"norm": torch.ones(3, dtype=torch.int8)}, "tensor norm is I8, which is not supported"),
        ({"norm": torch.ones(3).to(torch.float8_e4m3fn)}, "tensor norm is F8_E4M3, which is not supported"),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_weights_untouched(
    change: dict[str, torch.Tensor | None], complaint: str, tmp_path: Path
) -> None:
    stored = {name: tensor for name, tensor in {**tensors(), **change}.items() if tensor is not None}
    save_file(stored, tmp_path / "model.safetensors")
    weights = fused_weights()
    with pytest.raises(CheckpointError, match=complaint):
        fill(tmp_path, weights)
    assert all((buffer == -1).all() for buffer in weights.buffers.values())


ONE = {"a": entry(0, 8, [2])}
DAMAGE: list[tuple[str, dict[str, Any], str]] = [
    ("empty file", {"header": b"", "length": 0}, "bad header"),
    ("huge header", {"header": ONE, "data": bytes(8), "length": 1 << 60}, "claims 1152921504606846976 bytes"),
    ("header over the cap", {"header": b"{}" + b" " * checkpoints.MAX_HEADER_BYTES}, "at most 8388608 are possible"),
    ("not json", {"header": b"{nope"}, "bad header"),
    ("not an object", {"header": b"[]"}, "not a JSON object"),
    ("deep json", {"header": b"[" * 100_000}, "bad header"),
    ("not utf-8", {"header": b'{"\xff": 1}'}, "bad header"),
    ("entry is no object", {"header": {"a": 3}}, "bad header"),
    ("unknown field", {"header": {"a": {**ONE["a"], "x": 1}}, "data": bytes(8)}, "bad header"),
    ("repeated tensor", {"header": b'{"a": {}, "a": {}}'}, "the key 'a' occurs twice"),
    ("unknown dtype", {"header": {"a": entry(0, 8, [2], "F33")}, "data": bytes(8)}, "unknown dtype 'F33'"),
    ("size and shape differ", {"header": {"a": entry(0, 8, [3])}, "data": bytes(8)}, "takes 8 bytes, not those of F32"),
    ("negative shape", {"header": {"a": entry(0, 8, [-1, -2])}, "data": bytes(8)}, "tensor a: Expected `int` >= 0"),
    ("hole", {"header": {**ONE, "b": entry(12, 20, [2])}, "data": bytes(20)}, "b begins at byte 12 of the data, exp"),
    ("overlap", {"header": {**ONE, "b": entry(4, 12, [2])}, "data": bytes(12)}, "b begins at byte 4 of the data, exp"),
    (
        "begins late",
        {"header": {"a": entry(8, 16, [2])}, "data": bytes(16)},
        "begins at byte 8 of the data, expected 0",
    ),
    ("truncated", {"header": ONE, "data": bytes(7)}, "is truncated: 7 bytes of data, the header describes 8"),
    ("trailing bytes", {"header": ONE, "data": bytes(9)}, "is too long: 9 bytes of data, the header describes 8"),
]


@pytest.mark.parametrize(("case", "file", "complaint"), DAMAGE, ids=[case for case, _, _ in DAMAGE])
def test_damaged_files_are_refused_by_name(case: str, file: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", **file)
    with pytest.raises(CheckpointError, match=complaint) as refusal:
        Checkpoint.open(tmp_path)
    assert "model.safetensors" in str(refusal.value)


def many(count: int, prefix: str) -> bytes:
    """A header of so many empty tensors."""
    return json.dumps({f"{prefix}{number}": entry(0, 0, [0]) for number in range(count)}).encode()


EXCESS: list[tuple[str, bytes, str]] = [
    ("rank", json.dumps({"a": entry(0, 8, [1 << 62] * 60_000)}).encode(), "tensor a: Expected `array` of length <= 8"),
    ("rank of ones", json.dumps({"a": entry(0, 4, [1] * 9)}).encode(), "length <= 8"),
    ("a size beyond 63 bits", json.dumps({"a": entry(0, 8, [1 << 63])}).encode(), "bad header: tensor a: "),
    ("a number of 5,000 digits", b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", "bad header"),
    ("values", b'{"a": [' + b"1," * checkpoints.MAX_VALUES + b"1, 2]}", "more than 1048576 values"),
    ("name", json.dumps({"n" * 600: ONE["a"]}).encode(), "is longer than 512 characters"),
    ("a name of 8 MB", json.dumps({"n" * (8 << 20): ONE["a"]}).encode()[: 8 << 20], "bad header"),
    ("dtype", json.dumps({"a": entry(0, 8, [2], "F" * 1000)}).encode(), "length <= 32"),
    ("offset", json.dumps({"a": entry(0, 1 << 70, [2])}).encode(), "bad header: tensor a: "),
]


@pytest.mark.parametrize(("case", "header", "complaint"), EXCESS, ids=[case for case, _, _ in EXCESS])
def test_a_header_that_says_too_much_is_refused_in_one_short_line(
    case: str, header: bytes, complaint: str, tmp_path: Path
) -> None:
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=complaint) as refusal:
        Checkpoint.open(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(refusal.value)) < len(str(tmp_path)) + 400 and "\n" not in str(refusal.value)
    assert peak < 8 * len(header) + (1 << 17), "memory does not grow with what it claims"


def test_a_checkpoint_of_too_many_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "MAX_TENSORS", 5)
    write_raw(tmp_path / "a.safetensors", many(4, "a"))
    assert len(Checkpoint.open(tmp_path).tensors) == 4
    write_raw(tmp_path / "b.safetensors", many(4, "b"))
    with pytest.raises(CheckpointError, match="more than 5 tensors"):
        Checkpoint.open(tmp_path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
        listener.bind(path.name)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, unix_socket, Path.mkdir, zeros])
@pytest.mark.parametrize("name", ["model.safetensors", checkpoints.INDEX_NAME])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"cannot read .*{name}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ("{", "is not an index"),
        ('{"weight_map": 3}', "is not an index"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "which is not a safetensors file beside it"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "which is not a safetensors file beside it"),
        ('{"weight_map": {"a": "model.bin"}}', "which is not a safetensors file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "cannot read .*gone.safetensors: No such file"),
        ('{"weight_map": {"b": "model.safetensors"}}', "says that b is in model.safetensors, which does not hold it"),
    ],
)
def test_bad_indexes_are_refused(index: str, complaint: str, tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", ONE, bytes(8))
    (tmp_path / checkpoints.INDEX_NAME).write_text(index)
    with pytest.raises(CheckpointError, match=complaint):
        Checkpoint.open(tmp_path)


def test_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="only checkpoints in the safetensors"):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.safetensors", ONE, bytes(8))
    write_raw(tmp_path / "b.safetensors", ONE, bytes(8))
    with pytest.raises(CheckpointError, match="tensor a is in both"):
        Checkpoint.open(tmp_path)


def test_file_that_shrinks_while_it_is_read_is_reported(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 8)
    with pytest.raises(CheckpointError, match="truncated while it was read"):
        load.read_weights(checkpoint, fused_weights(), checkpoint.files)


def test_read_state_returns_tensors_under_their_own_names(tmp_path: Path) -> None:
    stored = tensors(torch.bfloat16)
    save_file({**stored, "steps": torch.ones(1, dtype=torch.int64)}, tmp_path / "model.safetensors")
    state = load.read_state(Checkpoint.open(tmp_path))
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_log_lines_and_progress_bar(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 3, "architectures": ["X"]}')
    config = resolved(model_path=str(tmp_path))
    with caplog.at_level(logging.INFO):
        load.load_weights(fused_weights(), config, model_info.load(config))
    assert [record.getMessage() for record in caplog.records] == [
        "Using model weights format ['*.safetensors']",
        f"No model.safetensors.index.json found in {tmp_path}.",
    ]
    bar = capsys.readouterr().err.splitlines()
    assert bar[0].startswith("Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]")
    assert bar[1].startswith("Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, ")


@pytest.mark.parametrize(
    ("done", "elapsed_s", "tail"),
    [
        (0, 0.0, "  0% Completed | 0/4 [00:00<?, ?it/s]"),
        (1, 30.0, " 25% Completed | 1/4 [00:30<01:30, 30.00s/it]"),
        (4, 0.5, "100% Completed | 4/4 [00:00<00:00,  8.00it/s]"),
    ],
)
def test_progress_lines(done: int, elapsed_s: float, tail: str) -> None:
    assert progress.line(done, 4, elapsed_s) == f"Loading safetensors checkpoint shards: {tail}"


@pytest.mark.parametrize("read", ["load_weights", "read_state"])
def test_weights_without_room_are_refused_before_they_are_read(
    read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 3, "architectures": ["X"]}')
    config = resolved(model_path=str(tmp_path))
    monkeypatch.setattr("quartet.runtime.process.memory.look", lambda: Memory(5, 1 << 30, "a limit"))
    with pytest.raises(StartupError, match=r"no room for the model's weights.* 0 MB may still be used by a limit; "):
        if read == "load_weights":
            load.load_weights(fused_weights(), config, model_info.load(config))
        else:
            load.read_state(Checkpoint.open(tmp_path))


def test_what_weights_take_counts_the_copies_that_are_computed_with() -> None:
    weights = fused_weights()
    alone = weights.served_bytes()
    layer = linear(weights, "qk", 0)
    assert alone == weights.nbytes() and weights.served_bytes() == alone + layer.packed_bytes
    layer.adopt(layer.pack(layer.weight))
    assert layer.packed_bytes == sum(block.numel() * block.dtype.itemsize for block in layer.packed or ())
