"""The header of a GGUF file: what is read, and how each kind of damage is refused."""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quartet.runtime.model_files import gguf
from quartet.runtime.model_files.gguf import GgufError, LongArray, read_header
from tests import gguf_files
from tests.gguf_files import ARRAY, F32, INT32, Q8_0, STRING, Stored, Value

VECTOR = Stored(F32, (4,), bytes(16))
MATRIX = Stored(Q8_0, (2, 64), bytes(2 * 2 * 34))
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def write(file: Path, metadata: list[tuple[str, Any]], tensors: list[tuple[str, Stored]] = (), **counts: int) -> Path:  # type: ignore[assignment]
    data = b"".join(tensor.data + bytes(-len(tensor.data) % 32) for _, tensor in tensors)
    file.write_bytes(gguf_files.header(metadata, list(tensors), **counts) + data)
    return file


def test_metadata_and_tensors_are_read_in_the_order_of_torch(tmp_path):
    values = [("a", 7), ("b", True), ("c", "text"), ("d", [1, 2]), ("e", 0.5), ("f", ["x", "y"])]
    file = write(tmp_path / "a.gguf", values, [("vector", VECTOR), ("matrix", MATRIX)])
    header = read_header(file)
    assert dict(header.metadata) == dict(values)
    vector, matrix = header.tensors["vector"], header.tensors["matrix"]
    assert (vector.type.name, vector.shape, vector.nbytes) == ("F32", (4,), 16)
    assert (matrix.type.name, matrix.shape, matrix.nbytes) == ("Q8_0", (2, 64), 136)
    assert matrix.offset - vector.offset == 32
    assert matrix.offset + 160 == file.stat().st_size


def test_long_arrays_are_stepped_over_unless_they_are_wanted(tmp_path):
    tokens = [f"token {number}" for number in range(gguf.SMALL_ARRAY + 1)]
    file = write(tmp_path / "a.gguf", [("tokens", tokens), ("behind", 1)])
    assert read_header(file).metadata == {"tokens": LongArray(len(tokens)), "behind": 1}
    assert read_header(file, whole=True).metadata == {"tokens": tokens, "behind": 1}


def test_the_alignment_of_the_file_counts(tmp_path):
    file = tmp_path / "a.gguf"
    header = gguf_files.header([("general.alignment", 64)], [("vector", VECTOR)])
    file.write_bytes(header + bytes(-len(header) % 64) + bytes(16))
    assert read_header(file).tensors["vector"].offset % 64 == 0


TOO_LONG = 1 << 62
NESTED = Value(ARRAY, 0)

BAD_METADATA: list[tuple[list[tuple[str, Any]], str]] = [
    ([("a", 1), ("a", 2)], "the key a occurs twice"),
    ([("general.alignment", 0)], "general.alignment is 0; it must be a power of two"),
    ([("general.alignment", 24)], "general.alignment is 24"),
    ([("general.alignment", "32")], "general.alignment is 32; it must be a power"),
    ([("k" * (gguf.MAX_KEY_BYTES + 1), 1)], "a key has 513 bytes, at most 512"),
    ([("a", "x" * (gguf.MAX_STRING_BYTES + 1))], "a has 1048577 bytes, at most 1048576"),
    ([("a", Value(STRING, b"\xff"))], "a is not valid UTF-8"),
]


@pytest.mark.parametrize(("metadata", "said"), BAD_METADATA)
def test_metadata_that_cannot_be_is_refused_by_name(metadata, said, tmp_path):
    file = write(tmp_path / "a.gguf", metadata)
    with pytest.raises(GgufError, match=said) as refused:
        read_header(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def value_of(kind: int, content: bytes) -> bytes:
    """A file whose only value has these bytes."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.text("key") + struct.pack("<I", kind) + content


RAW: list[tuple[bytes, str]] = [
    (b"", "it does not begin with GGUF"),
    (b"GGUF", "it does not begin with GGUF"),
    (b"GGML" + bytes(100), "it does not begin with GGUF"),
    (b"GGUF" + struct.pack("<I", 1) + bytes(100), "it has version 1; 2 and 3 are read"),
    (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
    (b"GGUF" + struct.pack("<IQQ", 3, TOO_LONG, 0), "it claims 4611686018427387904 tensors"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, TOO_LONG), "4611686018427387904 keys"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1, 0), "it ends at byte"),
    (value_of(99, bytes(8)), "key has the unknown type 99"),
    (value_of(STRING, struct.pack("<Q", TOO_LONG)), "key has 4611686018427387904 bytes"),
    (value_of(STRING, struct.pack("<Q", 1000)), "it ends at byte"),
    (value_of(ARRAY, struct.pack("<IQ", INT32, TOO_LONG)), "key has 4611686018427387904 elements"),
    (value_of(ARRAY, struct.pack("<IQ", STRING, TOO_LONG)), "key has 4611686018427387904 elements"),
    (value_of(ARRAY, struct.pack("<IQ", ARRAY, 1) * 40), "arrays more than 4 deep"),
    (value_of(ARRAY, struct.pack("<IQ", 99, 1) + bytes(8)), "key has the unknown type 99"),
    (value_of(ARRAY, struct.pack("<I", INT32)), "it ends at byte"),
]


@pytest.mark.parametrize(("content", "said"), RAW)
def test_lengths_and_types_that_cannot_be_are_refused(content, said, tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(GgufError, match=said):
        read_header(file)


def test_arrays_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_ELEMENTS", 10)
    file = write(tmp_path / "a.gguf", [("a", [0] * 6), ("b", [0] * 6)])
    with pytest.raises(GgufError, match="b has 6 elements, more than the file or the limit of 10 allows"):
        read_header(file)


def test_a_header_is_bounded_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 1000)
    monkeypatch.setattr(gguf, "CHUNK_BYTES", 100)
    with pytest.raises(GgufError, match="the header is larger than 1000 bytes"):
        read_header(write(tmp_path / "a.gguf", [("a", "x" * 2000)]))


BAD_TENSORS: list[tuple[list[tuple[str, Stored]], str]] = [
    ([("a", VECTOR), ("a", VECTOR)], "the tensor a occurs twice"),
    ([("a", VECTOR._replace(offset=1))], "tensor a begins at byte 1 of the data, expected 0"),
    ([("a", VECTOR), ("b", VECTOR._replace(offset=0))], "begins at byte 0 of the data, expected 32"),
    ([("a", VECTOR), ("b", VECTOR._replace(offset=16))], "tensor b begins at byte 16 of the data, expected 32"),
    ([("a", VECTOR), ("b", VECTOR._replace(offset=64))], "tensor b begins at byte 64 of the data, expected 32"),
    ([("a", VECTOR._replace(offset=TOO_LONG))], "tensor a begins at byte 4611686018427387904"),
    ([("a", VECTOR._replace(shape=(400,)))], "tensor a ends behind the end of the file"),
    ([("a", VECTOR._replace(shape=(TOO_LONG, 4)))], "tensor a has the impossible shape"),
    ([("a", VECTOR._replace(shape=(TOO_LONG,)))], "tensor a ends behind the end of the file"),
    ([("a", VECTOR._replace(shape=(0, 4)))], "tensor a has no values"),
    ([("a", VECTOR._replace(shape=()))], "tensor a has no values"),
    ([("a", VECTOR._replace(shape=(1, 1, 1, 1, 4)))], "tensor a has 5 dimensions; at most 4"),
    ([("a", VECTOR._replace(type=Q8_0))], "tensor a has rows of 4 values, Q8_0 needs multiples of 32"),
    ([("a", VECTOR._replace(type=16))], "tensor a is IQ2_XXS, which is not supported; F32, F16, Q4_0"),
    ([("a", VECTOR._replace(type=1 << 31))], "tensor a is of the unknown type 2147483648"),
    ([("n" * 513, VECTOR)], "the name of a tensor has 513 bytes, at most 512"),
]


@pytest.mark.parametrize(("tensors", "said"), BAD_TENSORS)
def test_tensors_that_cannot_be_are_refused_by_name(tensors, said, tmp_path):
    with pytest.raises(GgufError, match=said):
        read_header(write(tmp_path / "a.gguf", [("general.alignment", 32)], tensors))


def test_a_file_that_ends_within_its_last_tensor_is_refused(tmp_path):
    file = write(tmp_path / "a.gguf", [], [("a", VECTOR), ("b", MATRIX)])
    os.truncate(file, file.stat().st_size - 60)
    with pytest.raises(GgufError, match="tensor b ends behind the end of the file"):
        read_header(file)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(GgufError, match="cannot read"):
            read_header(path)


SOUND = gguf_files.header(
    [("general.alignment", 32), ("a", "text"), ("b", [1, 2, 3]), ("c", ["x", "y"])], [("v", VECTOR), ("m", MATRIX)]
) + bytes(32 + 160)


@settings(max_examples=400, deadline=None, suppress_health_check=UNCHECKED)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.binary(min_size=1, max_size=9)), max_size=4),
    cut=st.integers(0, len(SOUND)),
)
def test_a_damaged_header_is_read_or_refused_and_never_reaches_beyond_the_file(changes, cut, tmp_path):
    content = bytearray(SOUND)
    for position, data in changes:
        content[position : position + len(data)] = data
    check_any(bytes(content[:cut] if cut % 3 == 0 else content), tmp_path / "a.gguf")


@settings(max_examples=200, deadline=None, suppress_health_check=UNCHECKED)
@given(content=st.binary(max_size=300), tensors=st.integers(0, 3), keys=st.integers(0, 3))
def test_arbitrary_bytes_behind_a_sound_start_are_read_or_refused(content, tensors, keys, tmp_path):
    check_any(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + content, tmp_path / "a.gguf")


def check_any(content: bytes, file: Path) -> None:
    """The header is refused with one line, or its tensors lie within the file and do not overlap."""
    file.write_bytes(content)
    try:
        header = read_header(file, whole=True)
    except GgufError as error:
        assert "\n" not in str(error)
        return
    ends = 0
    for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.offset):
        assert tensor.offset >= ends
        ends = tensor.offset + tensor.nbytes
    assert ends <= len(content)
