"""Weights that come in a request: safetensors bytes, in a file that the gateway has written.

There are two layouts. Plain: the file's tensors are the model's. `flattened_bucket`: the file holds one flat tensor,
and under the key "metadata" of its `__metadata__` a JSON list of {name, shape, dtype, start_idx, end_idx}; the indices
count elements of the flat tensor, which are bytes where it is uint8.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import msgspec
import torch

from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import (
    DTYPES,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    CheckpointError,
    Header,
    Shape,
    Size,
    StoredTensor,
    read_header,
)
from quartet.scheduler_service.weights.tensor_io import bytes_of, open_file, read_exactly

PICKLES = (b"\x80", b"PK\x03\x04")  # a pickle from protocol 2 on; a file of torch.save
PICKLE_REFUSED = (
    "the payload is a pickle, and pickles are never loaded; send base64 of safetensors bytes, for example "
    "base64.b64encode(safetensors.torch.save(dict(named_tensors)))"
)
BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
BY_NAME |= {"half": torch.float16, "float": torch.float32, "double": torch.float64}
FLAT_DTYPES = DTYPES | {"U8": torch.uint8}
CODES = {dtype: code for code, dtype in DTYPES.items()}

Named = Iterable[tuple[str, torch.Tensor]]


class BucketEntry(msgspec.Struct):
    """Where one tensor lies in a flattened bucket."""

    name: str
    shape: Shape
    dtype: str
    start_idx: Size
    end_idx: Size


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name with or without `torch.`. Raises CheckpointError."""
    dtype = BY_NAME.get(name.removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"the dtype {short(name)!r} is not supported; known are {', '.join(BY_NAME)}")
    return dtype


def named_tensors(file: Path) -> Named:
    """The tensors of a plain payload, one at a time. Raises CheckpointError."""
    refuse_pickle(file)
    stored = read_header(file)
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"tensor {short(name)} is {tensor.dtype}, which is not supported")
        yield name, read_bytes(tensor).view(DTYPES[tensor.dtype]).view(tensor.shape)


def bucket_tensors(file: Path, most: int = MAX_TENSORS) -> Named:
    """The tensors of a flattened bucket, at most so many. Raises CheckpointError."""
    refuse_pickle(file)
    stored = read_header(file)
    if len(stored) != 1:
        raise CheckpointError(f"a flattened bucket holds one flat tensor, this one holds {len(stored)}")
    [flat] = stored.values()
    if flat.dtype not in FLAT_DTYPES or len(flat.shape) != 1:
        raise CheckpointError(f"the tensor of a flattened bucket is flat, this one is {flat.dtype} {list(flat.shape)}")
    return split(read_bytes(flat).view(FLAT_DTYPES[flat.dtype]), bucket_entries(file, most))


def bucket_entries(file: Path, most: int = MAX_TENSORS) -> list[BucketEntry]:
    """The list of tensors in a bucket's header, at most so many; `read_header` has checked that header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(min(MAX_HEADER_BYTES, int.from_bytes(stream.read(LENGTH_BYTES), "little"))))
    metadata = header.get("__metadata__")
    described = metadata.get("metadata") if isinstance(metadata, dict) else None
    if not isinstance(described, str):
        raise CheckpointError('the payload has no "metadata" in its safetensors __metadata__')
    try:
        if described.count("{") > most:
            raise CheckpointError(f"the bucket describes more than {most} tensors")
        return msgspec.json.decode(described, type=list[BucketEntry])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"the metadata of the bucket is no list of tensors: {error}") from error


def split(flat: torch.Tensor, entries: Iterable[BucketEntry]) -> Named:
    """The tensors that lie in a flat one. Raises CheckpointError where an entry does not fit."""
    for entry in entries:
        dtype = dtype_of(entry.dtype)
        part = flat[max(0, entry.start_idx) : entry.end_idx].contiguous()
        if entry.start_idx < 0 or part.nbytes != prod(entry.shape) * dtype.itemsize:
            raise CheckpointError(f"the bucket's indices of tensor {short(entry.name)} do not fit its shape and dtype")
        raw = part.view(torch.uint8)
        aligned = raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()
        yield entry.name, aligned.view(dtype).view(entry.shape)


def entries_of(names: list[str], dtypes: list[str], shapes: list[list[int]]) -> list[BucketEntry]:
    """The layout of a bucket that holds these tensors one after another, as bytes. Raises CheckpointError."""
    entries, end = [], 0
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        if len(shape) > MAX_RANK:
            raise CheckpointError(f"tensor {short(name)} has {len(shape)} dimensions, at most {MAX_RANK} are possible")
        start, end = end, end + prod(shape) * dtype_of(dtype).itemsize
        entries.append(BucketEntry(name, shape, dtype, start, end))
    return entries


def write_plain(tensors: Named, file: Path) -> None:
    """Write tensors as a plain payload. Raises CheckpointError for a name that is there twice."""
    header: dict[str, Header] = {}
    parts, end = [], 0
    for name, tensor in tensors:
        if name in header:
            raise CheckpointError(f"tensor {short(name)} is there twice")
        start, end = end, end + tensor.nbytes
        header[name] = Header(CODES[tensor.dtype], list(tensor.shape), (start, end))
        parts.append(tensor.contiguous().flatten().view(torch.uint8))
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % LENGTH_BYTES)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for part in parts:
            stream.write(bytes_of(part))


def check_checksums(file: Path, expected: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the tensors of a plain payload have these SHA-256, by their names."""
    stored = read_header(file)
    for name, checksum in expected.items():
        if name not in stored:
            raise CheckpointError(f"expected_checksums names the tensor {short(name)}, which was not sent")
        if hashlib.sha256(bytes_of(read_bytes(stored[name]))).hexdigest() != checksum.lower():
            raise CheckpointError(f"tensor {short(name)} has another SHA-256 than expected_checksums says")


def refuse_pickle(file: Path) -> None:
    """Raise CheckpointError for a payload that is a pickle."""
    with file.open("rb") as stream:
        begin = stream.read(4)
    # the length of a safetensors header may begin with the byte of a pickle, but `{` follows it then
    if begin.startswith(PICKLES) and not begins_like_safetensors(file):
        raise CheckpointError(PICKLE_REFUSED)


def begins_like_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(LENGTH_BYTES + 1)[LENGTH_BYTES:] == b"{"


def read_bytes(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor's bytes, uint8. Raises CheckpointError."""
    target = torch.empty(stored.nbytes, dtype=torch.uint8)
    with open_file(stored.file) as descriptor:
        read_exactly(descriptor, bytes_of(target), stored.offset, stored.file)
    return target
