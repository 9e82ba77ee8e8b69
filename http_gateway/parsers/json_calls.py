"""One tool call that is written as a JSON object: {"name": ..., "arguments": {...}} in any order and with more keys."""

import json
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from quartet.http_gateway.parsers.json_text import JsonText, Piece
from quartet.http_gateway.parsers.tool_events import CALL, NO_CALL, Events, Outcome

KEYS = frozenset({"name", "arguments", "parameters", "type", "id", "function"})
ARGUMENTS = ("arguments", "parameters")
MAX_KEY_CHARS = 256
CHARS_PER_ESCAPE = 6  # a character of a name may be written as \u00dc


class JsonCall:
    """Reads one call, and tells of it as soon as its name and the opening of its arguments are known.

    `outcome` says when it is over. What was read before it was `announced` is in `raw`, as it was written.
    """

    def __init__(self, known: Collection[str], events: Events, closing: str, name: str | None = None) -> None:
        """`closing`: the tag behind a call, which may come too early. `name`: given where only arguments follow."""
        self.outcome: Outcome | None = None
        self.raw: list[str] = []
        self.announced = False
        self._known = known
        self._events = events
        self._closing = closing
        self._json = JsonText()
        self._name = name
        self._base = 1  # the depth of the object that holds the keys
        self._key = ""
        self._keys = 0
        self._collected: list[str] = []  # of a string
        self._collected_chars = 0
        self._held: list[str] | None = None  # arguments that came before the name
        self._step: Callable[[Piece], bool] = self._opening
        if name is not None:
            self._base, self._step = 0, self._bare_opening

    def take(self, text: str, at: int) -> int:
        """Read on from `at`; where what follows is not of this call, or the text ends."""
        start = at
        while at < len(text) and self.outcome is None:
            piece = self._json.next(text, at)
            if piece.kind == "strange" and not self.announced:
                self.outcome = NO_CALL
            elif self._step(piece):
                at = piece.end
        if not self.announced:
            self.raw.append(text[start:at])
        return at

    # Each step takes one piece; False: it is not of this call, or must be looked at by another step.

    def _opening(self, piece: Piece) -> bool:
        self._step = self._key_or_end
        return True

    def _key_or_end(self, piece: Piece) -> bool:
        return self._close() if piece.kind == "close" else self._before_key(piece)

    def _before_key(self, piece: Piece) -> bool:
        if piece.kind == "quote":
            self._collect(self._in_key)
            return True
        return blank(piece) or self._over()

    def _in_key(self, piece: Piece) -> bool:
        if piece.kind == "string":
            return self._more(piece, MAX_KEY_CHARS)
        key = self._string()
        if key is None or (self._keys == 0 and key not in KEYS):
            return self._over()
        self._key, self._keys, self._step = key, self._keys + 1, self._colon
        return True

    def _colon(self, piece: Piece) -> bool:
        if piece.text == ":":
            self._step = self._value
            return True
        return blank(piece) or self._over()

    def _value(self, piece: Piece) -> bool:
        """The first piece of a key's value."""
        if blank(piece):
            return True
        if self.announced or self._key not in KEYS:
            self._step = self._skip
            return self._skip(piece)
        if self._key == "name":
            return self._collect(self._in_name) if piece.kind == "quote" else self._over()
        if self._key == "function" and piece.text == "{" and self._base == 1:
            self._base, self._step = 2, self._key_or_end
            return True
        if self._key in ARGUMENTS:
            return self._arguments(piece)
        self._step = self._skip
        return self._skip(piece)

    def _in_name(self, piece: Piece) -> bool:
        if piece.kind == "string":
            return self._more(piece, CHARS_PER_ESCAPE * max(map(len, self._known), default=0))
        self._name = self._string()
        if self._name not in self._known:
            return self._over()
        self._step = self._next
        return self._announce_held()

    def _arguments(self, piece: Piece) -> bool:
        if piece.text == "{":
            self._step = self._in_arguments
            if self._name is None:
                self._held = []
            else:
                self._announce()
            return self._in_arguments(piece)
        if piece.kind == "quote":
            return self._collect(self._in_text)
        if piece.kind == "plain":
            self._collect(self._in_word)
            return self._in_word(piece)
        return self._over()

    def _bare_opening(self, piece: Piece) -> bool:
        self._announce()
        self._step = self._in_arguments
        return self._in_arguments(piece)

    def _in_arguments(self, piece: Piece) -> bool:
        """Arguments stream through as they come."""
        if piece.kind == "strange" and piece.text.startswith(self._closing[:1] or "\0"):
            self._tell(self._json.closers[: self._json.depth - self._base])  # the end of the call, too early
            self.outcome = CALL
            return False
        self._tell(piece.text)
        if piece.kind == "close" and self._json.depth == self._base:
            if self._base == 0:
                self.outcome = CALL
            self._step = self._next
        return True

    def _in_text(self, piece: Piece) -> bool:
        """Arguments as a string that holds JSON."""
        if piece.kind == "string":
            self._collected.append(piece.text)
            return True
        arguments = object_text(self._string() or "{}")
        return self._over() if arguments is None else self._have(arguments)

    def _in_word(self, piece: Piece) -> bool:
        """Arguments as a bare word: null means none."""
        if piece.kind == "plain":
            return self._more(piece._replace(text=piece.text.strip()), len("null"))
        if "".join(self._collected) != "null":
            return self._over()
        self._have("{}")
        return False

    def _skip(self, piece: Piece) -> bool:
        """The value of a key that nobody asked for."""
        depth = self._json.depth
        if piece.kind == "close" and depth < self._base:
            return self._close()
        if piece.kind == "mark" and depth == self._base:
            if piece.text == ":":
                return self._over()
            self._step = self._before_key
        return True

    def _next(self, piece: Piece) -> bool:
        """Behind a value. Models forget the last brackets at times: a call that was announced is over then."""
        if piece.kind == "close":
            return self._close()
        if piece.text == ",":
            self._step = self._key_or_end if self.announced else self._before_key
            return True
        return blank(piece) or self._over()

    # What the steps have in common.

    def _close(self) -> bool:
        """The end of the object that holds the keys."""
        if self._base > 1:
            self._base, self._step = 1, self._next
            return True
        if not self.announced:
            if self._name is None:
                return self._over()
            self._announce()
            self._tell("{}")
        self.outcome = CALL
        return True

    def _over(self) -> bool:
        self.outcome = CALL if self.announced else NO_CALL
        return False

    def _collect(self, step: Callable[[Piece], bool]) -> bool:
        self._collected, self._collected_chars, self._step = [], 0, step
        return True

    def _more(self, piece: Piece, most_chars: int) -> bool:
        self._collected.append(piece.text)
        self._collected_chars += len(piece.text)
        return True if self._collected_chars <= most_chars else self._over()

    def _string(self) -> str | None:
        """The string that was collected, or None where it is none."""
        try:
            return msgspec.json.decode(f'"{"".join(self._collected)}"', type=str)
        except ValueError:
            return None

    def _have(self, arguments: str) -> bool:
        """The arguments are there at once."""
        self._step = self._next
        self._held = [arguments]
        return self._name is None or self._announce_held()

    def _announce_held(self) -> bool:
        if self._held is None:
            return True
        arguments = "".join(self._held)
        if object_text(arguments) is None:
            return self._over()
        self._held = None
        self._announce()
        self._tell(arguments)
        return True

    def _announce(self) -> None:
        assert self._name is not None
        self._events.start(self._name)
        self.announced = True
        self.raw = []

    def _tell(self, text: str) -> None:
        if self._held is None:
            self._events.arguments(text)
        else:
            self._held.append(text)


def blank(piece: Piece) -> bool:
    return piece.kind == "plain" and piece.text.isspace()


def object_text(text: str) -> str | None:
    """A JSON object as JSON text, or None where it is something else."""
    try:
        value: Any = msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError):
        return None
    return json.dumps(value, ensure_ascii=False)
