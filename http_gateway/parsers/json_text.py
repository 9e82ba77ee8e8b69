"""Reads JSON that a model writes, in pieces: brackets, strings and what is between, every character once.

Strings are mended on the way: a raw line break or another control character becomes its escape, and a backslash that
escapes nothing stands for itself.
"""

import re
from typing import Literal, NamedTuple

Kind = Literal["open", "close", "quote", "string", "unquote", "mark", "plain", "strange"]

OUTSIDE = re.compile(r'[^\[\]{}":,<]+')
INSIDE = re.compile(r'[^"\\\x00-\x1f]+')
PLAIN = re.compile(r"[\w\s.+-]*")  # what may stand outside of strings: numbers, words, blanks
KINDS: dict[str, Kind] = {"{": "open", "[": "open", "}": "close", "]": "close", ":": "mark", ",": "mark"}
ESCAPED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
HEX = frozenset("0123456789abcdefABCDEF")
UNICODE_ESCAPE_CHARS = 6


class Piece(NamedTuple):
    kind: Kind
    end: int  # where the next piece begins
    text: str  # mended


class JsonText:
    """Where a text stands: its open brackets, and whether it is inside a string."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._in_string = False
        self._escape = ""  # what was read of an escape

    @property
    def depth(self) -> int:
        return len(self._open)

    @property
    def closers(self) -> str:
        """What would close all that is open outside of strings."""
        return "".join("}" if bracket == "{" else "]" for bracket in reversed(self._open))

    def next(self, text: str, at: int) -> Piece:
        """The piece that begins at `at`."""
        if self._in_string:
            return self._string(text, at)
        if match := OUTSIDE.match(text, at):
            return Piece("plain" if PLAIN.fullmatch(match[0]) else "strange", match.end(), match[0])
        character = text[at]
        if character == '"':
            self._in_string = True
            return Piece("quote", at + 1, character)
        kind = KINDS.get(character, "strange")
        if kind == "open":
            self._open.append(character)
        elif kind == "close" and self._open:
            self._open.pop()
        return Piece(kind, at + 1, character)

    def _string(self, text: str, at: int) -> Piece:
        if self._escape:
            return self._escaped(text[at], at)
        if match := INSIDE.match(text, at):
            return Piece("string", match.end(), match[0])
        character = text[at]
        if character == '"':
            self._in_string = False
            return Piece("unquote", at + 1, character)
        if character == "\\":
            self._escape = character
            return Piece("string", at + 1, "")
        return Piece("string", at + 1, ESCAPED.get(character) or f"\\u{ord(character):04x}")

    def _escaped(self, character: str, at: int) -> Piece:
        """One more character of an escape; what turns out to be none is passed on with its backslash doubled."""
        escape, self._escape = self._escape, ""
        if escape == "\\":
            if character == "u":
                self._escape = "\\u"
                return Piece("string", at + 1, "")
            if character in '"\\/bfnrt':
                return Piece("string", at + 1, escape + character)
            return Piece("string", at + 1, "'") if character == "'" else Piece("string", at, "\\\\")
        if character not in HEX:
            return Piece("string", at, "\\" + escape)
        escape += character
        if len(escape) == UNICODE_ESCAPE_CHARS:
            return Piece("string", at + 1, escape)
        self._escape = escape
        return Piece("string", at + 1, "")
