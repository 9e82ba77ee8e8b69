"""A model's safetensors files, described by their headers and read into memory of our own, never mapped.

A header is untrusted: it must be small, valid, and account for every byte of its file exactly once.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch

from runtime.errors import StartupError

MAX_HEADER_BYTES = 8 << 20
MAX_INDEX_BYTES = 64 << 20
LENGTH_BYTES = 8
CHUNK_BYTES = 32 << 20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
OTHER_DTYPE_BYTES |= {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
DTYPE_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | OTHER_DTYPE_BYTES


class CheckpointError(StartupError):
    """A checkpoint cannot be read or does not fit the model; the text names the file or the tensor."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor's entry in a file's header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint and where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model directory, by name."""

    files: list[Path]
    tensors: dict[str, StoredTensor]
    indexed: bool  # the directory has an index file

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Read all headers. Raises CheckpointError where a file is missing, damaged or ambiguous."""
        weight_map = read_index(directory)
        files = [directory / name for name in sorted(set(weight_map.values()))] or shard_files(directory)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, tensor in read_header(file).items():
                if name in tensors:
                    raise CheckpointError(f"tensor {name} is in both {tensors[name].file} and {file}")
                tensors[name] = tensor
        check_index(directory, weight_map, tensors)
        return cls(files, tensors, indexed=bool(weight_map))


def shard_files(directory: Path) -> list[Path]:
    """The files of a directory without an index."""
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    if files := sorted(directory.glob("*.safetensors")):
        return files
    raise CheckpointError(f"no *.safetensors file in {directory}: only the safetensors format is read")


def read_index(directory: Path) -> dict[str, str]:
    """Tensor name → file name; empty where the directory has no index."""
    path = directory / INDEX_NAME
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_INDEX_BYTES} bytes")
    try:
        weight_map = msgspec.convert(parse_json(path.read_bytes())["weight_map"], dict[str, str])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {error}") from error
    for name in set(weight_map.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names the file {name!r}, which is not a safetensors file beside it")
    return weight_map


def check_index(directory: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{directory / INDEX_NAME} says that {name} is in {file}, which does not hold it")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises CheckpointError unless header and data fill the file exactly."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                limit = min(MAX_HEADER_BYTES, max(0, size - LENGTH_BYTES))
                raise CheckpointError(f"{file}: the header claims {length} bytes, at most {limit} are possible")
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    try:
        entries = parse_json(header)
        entries.pop("__metadata__", None)
        parsed = msgspec.convert(entries, dict[str, Header])
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: bad header: {error}") from error
    check_extents(file, parsed, size - LENGTH_BYTES - length)
    data = LENGTH_BYTES + length
    return {
        name: StoredTensor(file, entry.dtype, tuple(entry.shape), data + begin, end - begin)
        for name, entry in parsed.items()
        for begin, end in (entry.data_offsets,)
    }


def check_extents(file: Path, entries: dict[str, Header], data_bytes: int) -> None:
    """Tensors must lie end to end, each as long as its shape and dtype say."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{file}: tensor {name} has the unknown dtype {entry.dtype!r}")
        if begin != position:
            raise CheckpointError(f"{file}: tensor {name} begins at byte {begin} of the data, expected {position}")
        if min(entry.shape, default=1) < 0 or end - begin != prod(entry.shape) * DTYPE_BYTES[entry.dtype]:
            raise CheckpointError(
                f"{file}: tensor {name} takes {end - begin} bytes, not those of {entry.dtype} {entry.shape}"
            )
        position = end
    if position != data_bytes:
        state = "truncated" if data_bytes < position else "too long"
        raise CheckpointError(f"{file} is {state}: {data_bytes} bytes of data, the header describes {position}")


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys. Raises ValueError."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} occurs twice")
            found[key] = value
        return found

    data = json.loads(text, object_pairs_hook=unique)
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return data


def read_tensor(stored: StoredTensor, target: torch.Tensor, descriptor: int, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Read a tensor's bytes from an open file into `target`, converting dtype and device on the way."""
    dtype = DTYPES[stored.dtype]
    if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
        read_exactly(descriptor, bytes_of(target), stored.offset, stored.file)
        return
    assert target.is_contiguous(), stored
    flat = target.view(-1)
    buffer = torch.empty(min(flat.numel(), chunk_bytes // dtype.itemsize), dtype=dtype)
    for start in range(0, flat.numel(), max(1, buffer.numel())):
        part = flat[start : start + buffer.numel()]
        chunk = buffer[: part.numel()]
        offset = stored.offset + start * dtype.itemsize
        read_exactly(descriptor, bytes_of(chunk), offset, stored.file)
        part.copy_(chunk)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_exactly(descriptor: int, target: memoryview, offset: int, file: Path) -> None:
    """Fill `target` from the file's bytes at `offset`. Raises CheckpointError when the file ends before."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done : done + CHUNK_BYTES]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{file} was truncated while it was read, at byte {offset + done}")
        done += count
