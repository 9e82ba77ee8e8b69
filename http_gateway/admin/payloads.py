"""Large payloads of control requests: written to files in the run directory, because the ring carries only paths.

A body with weights is never in memory as a whole. Its long strings are decoded from base64 into files while they
arrive. What is left of the body, with a placeholder for each long string, is as small as any other body.
"""

import asyncio
import binascii
import filecmp
import os
import re
import secrets
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from quartet.runtime.control import ONE_PAYLOAD_A_RANK
from quartet.runtime.errors import Kind, RequestError

LONG_STRING_BYTES = 1 << 16  # a longer string is a payload
WRITE_CHARS = 1 << 20  # of base64, a multiple of four, decoded by one write; other tasks run between writes
BACKSLASH = ord("\\")
ESCAPE_BYTES = 6  # the longest
PREFIX = "payload-"
FIELD = "serialized_named_tensors"
STRUCTURE = re.compile(rb'(?:[^"]++|"[^"\\]{0,256}+")*+')  # and whole short strings without escapes
ESCAPE = re.compile(rb"\\(?:(/)|u00([0-9a-fA-F]{2}))")  # some encoders escape slash, plus or equals sign
INVALID_BASE64 = f"{FIELD} is not valid base64: {{}}."
ONE_OR_COPIES = f"{FIELD} needs one entry, or one for each of {{}} ranks with the same tensors; got {{}}."
COPIES_DIFFER = f"{FIELD}: entry {{}} is not the same as the first; an adapter has the same tensors for all ranks."
LONG_STRING_ELSEWHERE = f"Only the entries of {FIELD} may be longer than {LONG_STRING_BYTES} bytes."


def remove_leftovers(run_dir: str) -> None:
    """Remove the files of a gateway that died. A scheduler that still reads one has it open."""
    for file in Path(run_dir).glob(f"{PREFIX}*"):
        file.unlink(missing_ok=True)


class Upload:
    """Splits a body into a small `skeleton` and files. Leaving the `with` block removes the files."""

    def __init__(self, run_dir: str, ranks: int = 1, copies: bool = False) -> None:
        """`ranks`: of the model, each with a payload of its own; `copies`: all are the same, or there is one."""
        self.skeleton = bytearray()  # the body with a placeholder in place of each long string
        self.files: dict[str, Path] = {}  # by placeholder
        self._run_dir = run_dir
        self._ranks = ranks
        self._wrong_count = ONE_OR_COPIES if copies and ranks > 1 else ONE_PAYLOAD_A_RANK
        self._name = secrets.token_hex(8)  # random: a client cannot have sent a placeholder
        self._string: bytearray | None = None  # the string being read, while it is short
        self._payload: Payload | None = None  # the string being read, once it is long

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._payload is not None:
            self._payload.close()
        for file in self.files.values():
            file.unlink(missing_ok=True)

    async def feed(self, part: bytes) -> None:
        """Read the next bytes of the body. Raises RequestError: invalid base64, or the disk is full."""
        at = 0
        while at < len(part):
            if self._payload is not None:
                at = await self._read_payload(self._payload, part, at)
            elif self._string is not None:
                at = self._read_string(self._string, part, at)
            else:
                at = self._read_structure(part, at)

    def _read_structure(self, part: bytes, at: int) -> int:
        """Read up to the beginning of a string that may be long; returns the new position, as the other readers do."""
        found = STRUCTURE.match(part, at)
        assert found is not None, "it matches nothing too"
        end = found.end()
        self._string = bytearray() if end < len(part) else None
        self.skeleton += part[at : end + 1]
        return end + 1

    def _read_string(self, string: bytearray, part: bytes, at: int) -> int:
        quote = part.find(b'"', at)
        string += part[at : len(part) if quote < 0 else quote]
        closed = quote >= 0 and backslashes_at_end(string) % 2 == 0
        if len(string) > LONG_STRING_BYTES:
            self._begin_payload(string)
            return len(part) if quote < 0 else quote
        if quote < 0:
            return len(part)
        if closed:
            self.skeleton += string + b'"'
            self._string = None
        else:
            string += b'"'
        return quote + 1

    def _begin_payload(self, string: bytearray) -> None:
        if len(self.files) == self._ranks:
            raise RequestError(self._wrong_count.format(self._ranks, "more"), field=FIELD)
        placeholder = f"{PREFIX}{self._name}.{len(self.files)}"
        file = self.files[placeholder] = Path(self._run_dir) / placeholder
        self.skeleton += placeholder.encode() + b'"'
        self._string, self._payload = None, Payload(file)
        self._payload.text += string

    async def _read_payload(self, payload: "Payload", part: bytes, at: int) -> int:
        quote = part.find(b'"', at)
        payload.text += part[at : len(part) if quote < 0 else quote]
        if quote < 0:
            if len(payload.text) >= WRITE_CHARS:
                await asyncio.to_thread(payload.write)
            return len(part)
        await asyncio.to_thread(payload.finish)
        self._payload = None
        return quote + 1

    def files_of(self, entries: list[msgspec.Raw]) -> list[str]:
        """The files of a command's payloads, one a rank. Raises RequestError."""
        if len(entries) != self._ranks:
            raise RequestError(self._wrong_count.format(self._ranks, len(entries)), field=FIELD)
        found = [str(self.file_of(bytes(entry))) for entry in entries]
        self.check_placeholders(len(set(found)))
        return found

    async def one_of(self, entries: list[msgspec.Raw]) -> str:
        """The file of a payload that is there once, or once for each rank. Raises RequestError."""
        if len(entries) == 1:
            file = self.file_of(bytes(entries[0]))
            self.check_placeholders(1)
            return str(file)
        first, *others = self.files_of(entries)
        for number, other in enumerate(others, 2):
            if not await asyncio.to_thread(filecmp.cmp, first, other, shallow=False):
                raise RequestError(COPIES_DIFFER.format(number), field=FIELD)
        return first

    def file_of(self, entry: bytes) -> Path:
        """The file of an entry of the skeleton: a placeholder, or a short base64 string, which is written now."""
        if len(entry) < 2 or not entry.startswith(b'"'):
            raise RequestError(f"{FIELD} is a list of base64 strings.", field=FIELD)
        text = entry[1:-1].decode(errors="replace")
        if text not in self.files:
            self.files[text] = file = Path(self._run_dir) / f"{PREFIX}{self._name}.{len(self.files)}"
            payload = Payload(file)
            payload.text += entry[1:-1]
            payload.finish()
        return self.files[text]

    def check_placeholders(self, used: int) -> None:
        """Raise RequestError if the body has a long string outside of the `used` entries."""
        if len(self.files) != used:
            raise RequestError(LONG_STRING_ELSEWHERE, field=FIELD)


class Payload:
    """A file that base64 text is decoded into."""

    def __init__(self, file: Path) -> None:
        """Raises RequestError."""
        self.text = bytearray()  # not decoded yet
        self._stream: BinaryIO | None = None
        self._file = file

    def write(self) -> None:
        """Decode all complete groups of four characters. Raises RequestError."""
        last = self.text.rfind(b"\\", len(self.text) - ESCAPE_BYTES + 1)
        incomplete = self.text[last:] if last >= 0 else b""  # perhaps the beginning of an escape
        text = unescaped(self.text[: len(self.text) - len(incomplete)])
        end = len(text) - len(text) % 4
        self.text = text[end:] + incomplete
        self._decode(text[:end])

    def finish(self) -> None:
        """Decode the rest. Raises RequestError."""
        self._decode(unescaped(self.text))
        self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _decode(self, text: bytearray) -> None:
        try:
            if self._stream is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._stream = os.fdopen(os.open(self._file, flags, 0o600), "wb", buffering=0)
            for start in range(0, len(text), WRITE_CHARS):
                write_all(self._stream, binascii.a2b_base64(text[start : start + WRITE_CHARS], strict_mode=True))
        except binascii.Error as error:
            raise RequestError(INVALID_BASE64.format(error), field=FIELD) from error
        except OSError as error:
            raise RequestError(f"The payload could not be stored: {error.strerror}.", Kind.INTERNAL) from error


def backslashes_at_end(string: bytearray) -> int:
    count = 0
    while count < len(string) and string[-1 - count] == BACKSLASH:
        count += 1
    return count


def write_all(stream: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def unescaped(text: bytearray) -> bytearray:
    if b"\\" not in text:
        return text
    return ESCAPE.sub(lambda found: found[1] or bytes.fromhex(found[2].decode()), text)  # type: ignore[return-value]
