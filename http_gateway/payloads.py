"""Large payloads of control requests: put into files of the private run directory, for the ring carries only paths."""

import binascii
import contextlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from runtime.errors import Kind, RequestError

CHUNK_CHARS = 1 << 20  # of base64, a multiple of four; between chunks other requests have their turn
PREFIX = "payload-"
ESCAPE = re.compile(rb"\\\\")


@contextlib.contextmanager
def files(run_dir: str, count: int) -> Iterator[list[Path]]:
    """Names for so many files; what is there under them is removed at the end."""
    named = [Path(run_dir) / f"{PREFIX}{secrets.token_hex(8)}" for _ in range(count)]
    try:
        yield named
    finally:
        for file in named:
            file.unlink(missing_ok=True)


def sweep(run_dir: str) -> None:
    """Remove what a gateway that died has left; a scheduler that reads one still has it open."""
    for file in Path(run_dir).glob(f"{PREFIX}*"):
        file.unlink(missing_ok=True)


def store(entries: Sequence[msgspec.Raw], files: Sequence[Path]) -> None:
    """Decode JSON strings of base64 into a file each. Raises RequestError: no base64, or no room on the disk."""
    try:
        for file, entry in zip(files, entries, strict=True):
            write(file, base64_text(entry))
    except OSError as error:
        raise RequestError(f"The payload could not be stored: {error.strerror}.", Kind.INTERNAL) from error


def base64_text(entry: msgspec.Raw) -> memoryview:
    """The characters of a JSON string."""
    text = memoryview(entry)
    if len(text) < 2 or bytes(text[:1]) != b'"':
        raise RequestError("serialized_named_tensors is a list of base64 strings.", field="serialized_named_tensors")
    if ESCAPE.search(text):  # some encoders escape the slash
        return memoryview(msgspec.json.decode(entry, type=str).encode())
    return text[1:-1]


def write(file: Path, text: memoryview) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        for start in range(0, len(text), CHUNK_CHARS):
            try:
                stream.write(binascii.a2b_base64(text[start : start + CHUNK_CHARS], strict_mode=True))
            except binascii.Error as error:
                message = f"serialized_named_tensors is not valid base64: {error}."
                raise RequestError(message, field="serialized_named_tensors") from error
