"""The header of a GGUF file: its metadata and where its tensors lie. Plain Python, no torch and no numpy.

    "GGUF" │ version │ counts │ metadata: key, type, value … │ tensors: name, shape, type, offset … │ padding │ data

A header is untrusted. It is read piece by piece, never mapped; every length and count is compared with what is left of
the file and with a limit before anything is read or allocated by it. Only little-endian files of versions 2 and 3 are
read. Tensors must lie one behind the other, aligned, within the file.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.files import opened
from quartet.runtime.shorten import short

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 << 20  # vocabulary and merges included; the largest public ones have 20 MiB
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 512
MAX_NAME_BYTES = 512
MAX_STRING_BYTES = 1 << 20
MAX_ELEMENTS = 1 << 24  # of all arrays together
MAX_DEPTH = 4  # of arrays of arrays
MAX_RANK = 4
MAX_SIZE = (1 << 63) - 1
SMALL_ARRAY = 1 << 12  # elements; longer ones are vocabularies, which few readers want
CHUNK_BYTES = 1 << 20
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRUCTS = {kind: struct.Struct("<" + code) for kind, code in SCALARS.items()}
LENGTH, WORD = struct.Struct("<Q"), struct.Struct("<I")
CUT = "; the file is cut off, so download it again"


class GgufError(StartupError):
    """A GGUF file cannot be read; the text names it."""


class BlockType(NamedTuple):
    """How tensors of one type are stored: so many values together take so many bytes."""

    name: str
    values: int
    nbytes: int


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    30: BlockType("BF16", 1, 2),
}
OTHER_TYPES = {4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
OTHER_TYPES |= {21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
OTHER_TYPES |= {29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
SERVED_TYPES = ", ".join(kind.name for kind in TYPES.values())


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its shape in the order of torch (the last dimension is contiguous) and where its bytes are."""

    file: Path
    type: BlockType
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class LongArray:
    """Stands for an array of the metadata that was not wanted."""

    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says about itself."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class TensorInfo(NamedTuple):
    """A tensor's entry in the header."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # from the start of the data


class Cursor:
    """Reads a file from its start to the end, in chunks, and raises ValueError rather than go beyond a limit."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self._chunk = b""
        self._begin = 0  # of the chunk in the file
        self._next = 0  # in the chunk
        self._elements = 0

    @property
    def position(self) -> int:
        return self._begin + self._next

    def take(self, count: int) -> bytes:
        """The next bytes."""
        end = self._next + count
        if end > len(self._chunk):
            self._fill(count)
            end = count
        found = self._chunk[self._next : end]
        self._next = end
        return found

    def _fill(self, count: int) -> None:
        """Have at least so many bytes ahead, at the start of the chunk."""
        position = self.position
        if count > self.size - position:
            raise ValueError(
                f"it ends at byte {self.size}, where {count} more are expected behind byte {position}{CUT}"
            )
        if position + count > MAX_HEADER_BYTES:
            raise ValueError(f"the header is larger than {MAX_HEADER_BYTES} bytes")
        chunk = self._chunk[self._next :]
        while len(chunk) < count:
            more = os.pread(self._descriptor, max(CHUNK_BYTES, count - len(chunk)), position + len(chunk))
            if not more:
                raise ValueError("it was cut off while it was read")
            chunk += more
        self._chunk, self._begin, self._next = chunk, position, 0

    def word(self) -> int:
        return int(WORD.unpack(self.take(4))[0])

    def length(self) -> int:
        return int(LENGTH.unpack(self.take(8))[0])

    def string(self, most: int, what: str) -> str:
        """A text of at most so many bytes."""
        if (count := self.length()) > most:
            raise ValueError(f"{what} has {count} bytes, at most {most} are possible")
        try:
            return self.take(count).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not valid UTF-8: {error}") from error

    def value(self, kind: int, what: str, whole: bool, depth: int = 0) -> Any:
        """A value of the metadata. Long arrays are skipped and given as their length, unless `whole`."""
        if kind in STRUCTS:
            return STRUCTS[kind].unpack(self.take(STRUCTS[kind].size))[0]
        if kind == STRING:
            return self.string(MAX_STRING_BYTES, what)
        if kind != ARRAY:
            raise ValueError(f"{what} has the unknown type {kind}")
        if depth == MAX_DEPTH:
            raise ValueError(f"{what} is an array of arrays more than {MAX_DEPTH} deep")
        return self._array(what, whole, depth + 1)

    def _array(self, what: str, whole: bool, depth: int) -> Any:
        kind, count = self.word(), self.length()
        least = STRUCTS[kind].size if kind in STRUCTS else LENGTH.size
        self._elements += count
        if count > (self.size - self.position) // least or self._elements > MAX_ELEMENTS:
            raise ValueError(f"{what} has {count} elements, more than the file or the limit of {MAX_ELEMENTS} allows")
        wanted = whole or count <= SMALL_ARRAY
        if kind in STRUCTS:
            data = self.take(count * least)
            return list(struct.unpack(f"<{count}{SCALARS[kind]}", data)) if wanted else LongArray(count)
        found = []
        for _ in range(count):
            element = self.value(kind, what, whole, depth)
            if wanted:
                found.append(element)
        return found if wanted else LongArray(count)


def read_header(file: Path, whole: bool = False) -> Header:
    """Metadata and tensors of one file; `whole`: with the vocabulary. Raises GgufError."""
    try:
        with opened(file) as descriptor:
            cursor = Cursor(descriptor)
            metadata, infos = parse(cursor, whole)
            data = aligned(cursor.position, alignment_of(metadata))
            return Header(file, metadata, placed(file, infos, data, cursor.size, alignment_of(metadata)))
    except OSError as error:
        raise GgufError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise GgufError(f"{file} is not a GGUF file that can be served: {error}") from error


def parse(cursor: Cursor, whole: bool) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Metadata and entries of tensors as they are written. Raises ValueError."""
    if cursor.size < len(MAGIC) + 4 or cursor.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF; check what was downloaded")
    check_version(cursor.word())
    tensors, keys = cursor.length(), cursor.length()
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise ValueError(f"it claims {tensors} tensors and {keys} keys; at most {MAX_TENSORS} and {MAX_KEYS} are read")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string(MAX_KEY_BYTES, "a key")
        if key in metadata:
            raise ValueError(f"the key {short(key)} occurs twice")
        metadata[key] = cursor.value(cursor.word(), short(key), whole)
    return metadata, [tensor_info(cursor) for _ in range(tensors)]


def check_version(version: int) -> None:
    """Raise ValueError for a version that is not read."""
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise ValueError("it is a big-endian file; only little-endian ones are read")
    raise ValueError(f"it has version {version}; 2 and 3 are read")


def tensor_info(cursor: Cursor) -> TensorInfo:
    """The next entry. Raises ValueError."""
    name = cursor.string(MAX_NAME_BYTES, "the name of a tensor")
    rank = cursor.word()
    if rank > MAX_RANK:
        raise ValueError(f"tensor {short(name)} has {rank} dimensions; at most {MAX_RANK} are possible")
    shape = tuple(reversed([cursor.length() for _ in range(rank)]))
    return TensorInfo(name, shape, cursor.word(), cursor.length())


def alignment_of(metadata: Mapping[str, Any]) -> int:
    """What offsets of tensors are multiples of. Raises ValueError."""
    found = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(found) is int and 0 < found <= MAX_ALIGNMENT and not found & (found - 1):
        return found
    raise ValueError(f"general.alignment is {short(found)}; it must be a power of two up to {MAX_ALIGNMENT}")


def aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def placed(file: Path, infos: list[TensorInfo], data: int, size: int, alignment: int) -> dict[str, Tensor]:
    """The tensors by name, each behind the one before. Raises ValueError."""
    tensors: dict[str, Tensor] = {}
    expected = 0
    for info in sorted(infos, key=lambda info: info.offset):
        if info.name in tensors:
            raise ValueError(f"the tensor {short(info.name)} occurs twice")
        kind, nbytes = stored_as(info)
        if info.offset != expected:
            raise ValueError(f"tensor {short(info.name)} begins at byte {info.offset} of the data, expected {expected}")
        if data + info.offset + nbytes > size:
            raise ValueError(f"tensor {short(info.name)} ends behind the end of the file, at byte {size}{CUT}")
        tensors[info.name] = Tensor(file, kind, info.shape, data + info.offset, nbytes)
        expected = aligned(info.offset + nbytes, alignment)
    return tensors


def stored_as(info: TensorInfo) -> tuple[BlockType, int]:
    """Type and bytes of a tensor. Raises ValueError."""
    kind = TYPES.get(info.type)
    if kind is None:
        named = OTHER_TYPES.get(info.type, f"of the unknown type {info.type}")
        raise ValueError(f"tensor {short(info.name)} is {named}, which is not supported; {SERVED_TYPES} are")
    if not info.shape or 0 in info.shape:
        raise ValueError(f"tensor {short(info.name)} has no values")
    count = prod(info.shape)
    if count > MAX_SIZE:
        raise ValueError(f"tensor {short(info.name)} has the impossible shape {short(list(info.shape))}")
    if info.shape[-1] % kind.values:
        raise ValueError(
            f"tensor {short(info.name)} has rows of {info.shape[-1]} values, {kind.name} needs multiples "
            f"of {kind.values}"
        )
    return kind, count // kind.values * kind.nbytes
