"""How a tokenizer writes bytes as token strings, read from its decoder."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from string import hexdigits
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

METASPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
EACH_BYTE = "quartet-each-byte"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for every byte that is no UTF-8, as the byte-fallback decoder has it."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _each_byte)


@dataclass(frozen=True)
class Spelling:
    """How token strings become text."""

    bytes_of: Callable[[str], bytes]
    errors: str  # the codec error handler that makes U+FFFD of invalid UTF-8
    strips_first: bool = False  # the space at the start of a text is the tokenizer's, not the text's

    def byte_ids(self, tokenizer: "Tokenizer") -> Iterator[int]:
        """The tokens that are one byte, by its number."""
        if self.errors == EACH_BYTE:
            for digits in product(hexdigits, repeat=2):
                if (id := tokenizer.token_to_id(f"<0x{''.join(digits)}>")) is not None:
                    yield id


def _byte_level_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


ALPHABET = _byte_level_alphabet()


def byte_level(token: str) -> bytes:
    """A token with a character outside the alphabet was added as it stands."""
    try:
        return bytes([ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def byte_fallback(token: str) -> bytes:
    match = BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(match[1]) if match else token.replace(METASPACE, " ").encode()


def spelling_of(tokenizer: "Tokenizer") -> Spelling | None:
    """None where tokens are not runs of bytes, or their decoder is one that we do not know."""
    match _stages(tokenizer):
        case [{"type": "ByteLevel"}]:
            return Spelling(byte_level, "replace")
        case [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *rest,
        ]:
            return _fallback_spelling(rest)
    return None


def _fallback_spelling(rest: list[dict[str, Any]]) -> Spelling | None:
    match rest:
        case []:
            return Spelling(byte_fallback, EACH_BYTE)
        case [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return Spelling(byte_fallback, EACH_BYTE, strips_first=True)
    return None


def _stages(tokenizer: "Tokenizer") -> list[dict[str, Any]]:
    """The decoder's steps, as tokenizer.json has them."""
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]
