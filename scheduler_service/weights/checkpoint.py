"""The tensors of a model directory, found in the headers of its safetensors files.

A header is untrusted: it must be small, valid, and account for every byte of its file exactly once. Its size and values
are limited before anything is computed from it, since reading it holds the lock of the interpreter.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from quartet.kernels.cpu.native.quantized import QuantizedRows, Scheme
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.files import opened, present, read_small
from quartet.runtime.shorten import reason, short
from quartet.scheduler_service.weights.cuts import Cut

MAX_HEADER_BYTES = 8 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_TENSORS = 1 << 18  # of a checkpoint; the largest public ones have 140,000
MAX_VALUES = 1 << 20  # of a header: numbers, names and lists
MAX_RANK = 8
MAX_NAME_CHARS = 512
MAX_SIZE = (1 << 63) - 1
LENGTH_BYTES = 8
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
OTHER_DTYPE_BYTES |= {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
DTYPE_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | OTHER_DTYPE_BYTES


class CheckpointError(StartupError):
    """A checkpoint cannot be read or does not fit the model; the text names the file or the tensor."""


Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]
Shape = Annotated[list[Size], msgspec.Meta(max_length=MAX_RANK)]
Dtype = Annotated[str, msgspec.Meta(max_length=32)]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor's entry in a file's header."""

    dtype: Dtype
    shape: Shape
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the values of a tensor are made of its bytes, where these are not the values themselves."""

    name: str  # equal for encodings that are equal
    unit_bytes: int  # bytes that are decoded together
    unit_values: int  # values that they become
    decode: Callable[[torch.Tensor], torch.Tensor] = field(compare=False)  # bytes of whole units → values, flat
    scheme: Scheme | None = None  # of the integers that the values are made of, if they are
    # (bytes of rows of whole units, columns of each) → their numbers
    numbers: Callable[[torch.Tensor, int], QuantizedRows] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint and where its bytes are."""

    file: Path
    dtype: str  # of the values
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int  # in the file
    origin: Path | None = None  # the file of the checkpoint that `file` was converted from
    encoding: Encoding | None = None  # None: the bytes are the values
    pitch: int = 0  # bytes from one row to the next in the file, where the tensor has a part of each; 0: rows are whole
    pieces: tuple[tuple[int, int], ...] = ()  # offset and bytes of each, where whole rows lie in several places

    @property
    def unit(self) -> tuple[int, int]:
        """The bytes that are read together at least, and how many values they are."""
        if self.encoding is None:
            return DTYPE_BYTES[self.dtype], 1
        return self.encoding.unit_bytes, self.encoding.unit_values

    def chunk_bytes(self, most: int) -> int:
        """How many bytes to read at once: at most so many where units are not larger, and whole units."""
        unit_bytes, _ = self.unit
        return max(1, most // unit_bytes) * unit_bytes

    def index(self, start: int) -> int:
        """The number of values before a byte that begins a unit."""
        unit_bytes, unit_values = self.unit
        return start // unit_bytes * unit_values

    def values(self, memory: torch.Tensor) -> torch.Tensor:
        """The values of some of the tensor's bytes, whole units of them, on the device of `memory`. Flat."""
        return memory.view(DTYPES[self.dtype]) if self.encoding is None else self.encoding.decode(memory)

    @property
    def shown(self) -> Path:
        """The file of the checkpoint, for messages."""
        return self.origin or self.file


@dataclass(frozen=True, slots=True)
class Part:
    """One of the stored tensors that a quantized one is made of."""

    stored: StoredTensor
    axis: int | None  # along which the rows of the quantized tensor lie; None: all rows need all of it
    per: int = 1  # rows that share one place along that axis
    each: int = 1  # places that a row takes
    across: int | None = None  # the axis along which its columns lie; None: all columns need all of it
    unit: tuple[int, int] = (1, 1)  # columns that lie together along that axis, and the places that they take


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor of the model that is made of several stored ones, any rows of it by themselves.

    Of a rank's part `shape` is that of the part; all else describes the whole tensor (reading.py).
    """

    shape: tuple[int, ...]  # (rows, columns), or of a vector (rows,)
    parts: dict[str, Part]
    expand: Callable[[dict[str, torch.Tensor], int], torch.Tensor]  # (parts of some rows, the first of them) → values
    unit_rows: int = 1  # a range of rows begins at a multiple of so many
    scheme: Scheme | None = None  # in which its numbers can be kept as they are stored
    numbers: Callable[[dict[str, torch.Tensor], int], QuantizedRows] | None = None  # those, where there is a scheme
    unit_columns: int = 0  # a range of columns begins at a multiple of so many; 0: rows are read whole
    at_once: bool = False  # rows are read together: few of them would be many small reads
    divisible: "Callable[[], Quantized | None] | None" = (
        None  # looks whether some columns can be read after all, and how
    )
    cut: Cut | None = None  # the part of it that this is; None: it is whole

    @property
    def nbytes(self) -> int:
        """What it takes in the files; of a part about."""
        stored = sum(part.stored.nbytes for part in self.parts.values())
        return stored if self.cut is None else stored * prod(self.shape) // prod(self.cut.whole)

    @property
    def shown(self) -> Path:
        """The file of the checkpoint, for messages."""
        return next(iter(self.parts.values())).stored.shown


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model directory, by name."""

    files: list[Path]
    tensors: dict[str, StoredTensor]
    indexed: bool  # the directory has an index file
    strict: bool = False  # a tensor that the model has no use for means that it is another model
    quantized: dict[str, Quantized] = field(default_factory=dict)  # name in the model → what it is made of
    spent: frozenset[str] = frozenset()  # tensors that are parts of those, or that say how activations are quantized
    scratch: tuple[object, ...] = ()  # keeps converted files alive, which have no name

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Read all headers. Raises CheckpointError where a file is missing, damaged or ambiguous."""
        weight_map = read_index(directory)
        files = [directory / name for name in sorted(set(weight_map.values()))] or shard_files(directory)
        tensors = read_headers(directory, zip(files, files, strict=True))
        check_index(directory / INDEX_NAME, weight_map, tensors)
        return cls(files, tensors, indexed=bool(weight_map))


def shard_files(directory: Path) -> list[Path]:
    """The files of a directory without an index."""
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    if files := sorted(directory.glob("*.safetensors")):
        return files
    raise CheckpointError(
        f"no *.safetensors file in {directory}: only checkpoints in the safetensors or *.bin format are read"
    )


def read_index(directory: Path) -> dict[str, str]:
    """Tensor name → file name; empty where the directory has no index."""
    return read_weight_map(directory / INDEX_NAME, ".safetensors")


def read_weight_map(path: Path, suffix: str) -> dict[str, str]:
    """Tensor name → name of a file beside this index, all with one suffix; empty where there is no index."""
    if not present(path):
        return {}
    try:
        content = read_small(path, MAX_INDEX_BYTES)
    except StartupError as error:
        raise CheckpointError(str(error)) from error
    try:
        check_count(path, content.count(b":") // 2)  # as many as it could have, were half of them in names
        weight_map = msgspec.convert(parse_json(content)["weight_map"], dict[str, str])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of {suffix[1:]} files: {reason(error)}") from error
    for name in set(weight_map.values()):
        if Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(f"{path} names the file {short(name)!r}, which is not a {suffix[1:]} file beside it")
    return weight_map


def check_count(where: Path, tensors: int) -> None:
    """Raise CheckpointError for more tensors than any checkpoint has."""
    if tensors > MAX_TENSORS:
        raise CheckpointError(f"{where} has more than {MAX_TENSORS} tensors")


def check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    """Raise CheckpointError where a tensor is not in the file that the index says."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].shown.name != file:
            raise CheckpointError(f"{index} says that {short(name)} is in {short(file)}, which does not hold it")


def read_headers(directory: Path, files: Iterable[tuple[Path, Path]]) -> dict[str, StoredTensor]:
    """The tensors of several files, each given as (file to read, file of the checkpoint). Raises CheckpointError."""
    tensors: dict[str, StoredTensor] = {}
    for file, origin in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {short(name)} is in both {tensors[name].shown} and {origin}")
            tensors[name] = tensor if file == origin else replace(tensor, origin=origin)
        check_count(directory, len(tensors))
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises CheckpointError unless header and data fill the file exactly."""
    header, size = header_of(file)
    try:
        parsed = parse_header(header)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: bad header: {short(error)}") from error
    data = LENGTH_BYTES + len(header)
    check_extents(file, parsed, size - data)
    return {
        name: StoredTensor(file, entry.dtype, tuple(entry.shape), data + begin, end - begin)
        for name, entry in parsed.items()
        for begin, end in (entry.data_offsets,)
    }


def read_metadata(file: Path) -> dict[str, Any]:
    """What a file's header says beside its tensors. Raises CheckpointError."""
    header, _ = header_of(file)
    try:
        found = parse_json(header).get("__metadata__")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: bad header: {short(error)}") from error
    return found if isinstance(found, dict) else {}


def header_of(file: Path) -> tuple[bytes, int]:
    """The header of a file, and the size of the file in bytes. Raises CheckpointError."""
    try:
        with opened(file) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
            size = os.fstat(descriptor).st_size
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                limit = min(MAX_HEADER_BYTES, max(0, size - LENGTH_BYTES))
                raise CheckpointError(f"{file}: the header claims {length} bytes, at most {limit} are possible")
            return stream.read(length), size
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def parse_header(header: bytes) -> dict[str, Header]:
    """The entries of a header, each within bounds. Raises ValueError."""
    if header.count(b",") > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} values")
    entries = parse_json(header)
    entries.pop("__metadata__", None)
    parsed = {}
    for name, entry in entries.items():  # one by one, so that other threads can run in between
        if len(name) > MAX_NAME_CHARS:
            raise ValueError(f"the name {short(name)} is longer than {MAX_NAME_CHARS} characters")
        try:
            parsed[name] = msgspec.convert(entry, Header)
        except msgspec.ValidationError as error:
            raise ValueError(f"tensor {short(name)}: {short(error)}") from error
    return parsed


def check_extents(file: Path, entries: dict[str, Header], data_bytes: int) -> None:
    """Tensors must lie end to end, each as long as its shape and dtype say."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{file}: tensor {short(name)} has the unknown dtype {entry.dtype!r}")
        if begin != position:
            raise CheckpointError(
                f"{file}: tensor {short(name)} begins at byte {begin} of the data, expected {position}"
            )
        if end - begin != prod(entry.shape) * DTYPE_BYTES[entry.dtype]:
            raise CheckpointError(
                f"{file}: tensor {short(name)} takes {end - begin} bytes, not those of {entry.dtype} {entry.shape}"
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
                raise ValueError(f"the key {short(key)!r} occurs twice")
            found[key] = value
        return found

    data = json.loads(text, object_pairs_hook=unique)
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return data
