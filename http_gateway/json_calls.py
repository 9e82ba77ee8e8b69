"""Tool calls whose body is a JSON object, as Hermes, Qwen, Llama and Mistral models write them."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from http_gateway.held_back import held_back
from http_gateway.tool_events import Event, Events


class JsonValue:
    """Follows one JSON object through a stream, by its brackets and strings."""

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self._in_string = False
        self._escaped = False

    def take(self, text: str) -> int | None:
        """How many characters of `text` end the object, or None while it goes on."""
        for at, character in enumerate(text):
            if self._in_string:
                self._string(character)
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return at + 1
        return None

    def _string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False


@dataclass(frozen=True)
class Dialect:
    """How a family of models writes calls whose body is a JSON object."""

    opening: str = ""  # the tag before a call; with none, calls stand at the beginning of the output
    bare: str = ""  # what opens a call at the beginning of the output, with no tag
    array: bool = False  # calls stand in a JSON array
    closing: str = ""  # the tag behind a call
    between: re.Pattern[str] | None = None  # from one call to the next
    named: bool = False  # the tag may also be followed by name{arguments}


DIALECTS = {
    "hermes": Dialect("<tool_call>", closing="</tool_call>"),
    "llama3": Dialect("<|python_tag|>", bare="{", between=re.compile(r"\s*[;,]?\s*(<\|python_tag\|>)?\s*(?=\{)")),
    "mistral": Dialect("[TOOL_CALLS]", array=True, named=True, between=re.compile(r"\s*,\s*(?=\{)")),
    "required": Dialect(bare="[", array=True, between=re.compile(r"\s*,\s*(?=\{)")),
}

STRING = r'"(?:[^"\\]|\\.)*"'
HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*({STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)', re.DOTALL)
NAMED_HEAD = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
MAYBE_NAMED_HEAD = re.compile(r"\s*[\w.-]+(\[[\w\]]*(\[\w*\]?)?)?\s*")
MAYBE_BETWEEN = re.compile(r"[;,]?\s*[<|\w]*")
FIRST_KEY = re.compile(rf"\s*\{{\s*({STRING})\s*:", re.DOTALL)
MAX_HEAD_CHARS = 2048  # a longer head is read only when its object is complete
MAX_WASTED_CHARS = 1 << 20  # read as calls that were none; what is behind them is read as text
KEYS = frozenset({"name", "arguments", "parameters", "type", "id", "function"})


class JsonCalls:
    """The parser of every dialect in `DIALECTS`: text, then a call's head, its arguments, its end."""

    def __init__(self, dialect: Dialect, known: Iterable[str]) -> None:
        self._dialect = dialect
        self._known = frozenset(known)
        self._events = Events()
        self._buffer = ""
        self._opening = ""  # what led to the head that is being read; content if that turns out to be none
        self._ended = False
        self._at_start = True
        self._in_array = False
        self._bare_body = False  # name{arguments}: no object around the arguments
        self._value = JsonValue()
        self._scanned = 0  # characters of the buffer that `_value` has seen, while a head is read
        self._wasted = 0  # characters that `_value` has seen of objects that turned out to be no calls
        self._state: Callable[[], bool] = self._text

    def feed(self, delta: str) -> list[Event]:
        self._buffer += delta
        self._run()
        return self._events.take()

    def finish(self) -> list[Event]:
        self._ended = True
        self._run()
        while self._state == self._head:  # a head that never came to an end is content
            self._wasted += len(self._buffer)
            self._reject()
            self._run()
        self._events.finish()
        return self._events.take()

    def _run(self) -> None:
        while self._buffer and self._state():
            pass

    # Each state reads from the buffer; it returns False when it needs more, True when another turn may help.

    def _text(self) -> bool:
        dialect, buffer = self._dialect, self._buffer
        if self._wasted > MAX_WASTED_CHARS:
            self._content(len(buffer))
            return False
        if self._at_start and dialect.bare:
            solid = buffer.lstrip()
            if solid.startswith(dialect.bare):
                return self._open("", len(buffer) - len(solid))
            if not solid and not self._ended:
                return False
        at = buffer.find(dialect.opening) if dialect.opening else -1
        if at >= 0:
            self._content(at)
            return self._open(dialect.opening, 0)
        held = held_back(buffer, dialect.opening) if dialect.opening and not self._ended else 0
        self._content(len(buffer) - held)
        return False

    def _content(self, count: int) -> None:
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        self._events.content(text)
        self._at_start = self._at_start and not text.strip()

    def _open(self, tag: str, blanks: int) -> bool:
        self._content(blanks)
        self._at_start = False
        self._in_array = False
        self._read_head(tag, len(tag))
        return True

    def _read_head(self, opening: str, count: int) -> None:
        """A call should follow the next `count` characters."""
        self._opening, self._buffer = opening, self._buffer[count:]
        self._value, self._scanned = JsonValue(), 0
        self._state = self._head

    def _head(self) -> bool:
        solid = self._buffer.lstrip()
        if not solid:
            return False
        if self._dialect.array and not self._in_array and solid[0] == "[":
            opened = len(self._buffer) - len(solid) + 1
            self._read_head(self._opening + self._buffer[:opened], opened)
            self._in_array = True
            return True
        if solid[0] != "{":
            return self._named_head()
        if match := HEAD.match(self._buffer, 0, MAX_HEAD_CHARS):
            return self._announce(json_string(match[1]), match.end())
        key = FIRST_KEY.match(self._buffer, 0, MAX_HEAD_CHARS)
        if key and json_string(key[1]) not in KEYS:
            return self._reject()
        end = self._value.take(self._buffer[self._scanned :])
        if end is None:
            self._scanned = len(self._buffer)
            return False
        return self._whole(self._scanned + end)

    def _named_head(self) -> bool:
        if not self._dialect.named or self._in_array:
            return self._reject()
        if match := NAMED_HEAD.match(self._buffer):
            self._bare_body = True
            return self._announce(match[1], match.end())
        return False if MAYBE_NAMED_HEAD.fullmatch(self._buffer) else self._reject()

    def _announce(self, name: str | None, end: int) -> bool:
        if name not in self._known:
            self._bare_body = False
            return self._reject()
        self._events.start(name)
        self._buffer = self._buffer[end:]
        self._value, self._state = JsonValue(), self._arguments
        return True

    def _whole(self, end: int) -> bool:
        """A complete object whose keys stand in another order, or whose arguments are no object."""
        call = whole_call(self._buffer[:end])
        if call is None or call[0] not in self._known:
            self._wasted += end
            return self._reject()
        self._events.start(call[0])
        self._events.arguments(call[1])
        self._buffer, self._state = self._buffer[end:], self._between
        return True

    def _reject(self) -> bool:
        """No call after all: what led here is content, and the rest is read as text."""
        self._events.content(self._opening)
        self._opening, self._state = "", self._text
        return True

    def _arguments(self) -> bool:
        end = self._value.take(self._buffer)
        self._events.arguments(self._buffer[:end])
        if end is None:
            self._buffer = ""
            return False
        self._buffer = self._buffer[end:]
        self._state = self._between if self._bare_body else self._close
        self._bare_body = False
        return True

    def _close(self) -> bool:
        """The end of the object around the arguments; models forget it at times."""
        solid = self._buffer.lstrip()
        if not solid:
            return False
        if solid[0] == ",":  # more keys: nobody asked for them
            self._value, self._state = JsonValue(depth=1), self._skip
        else:
            self._buffer = solid.removeprefix("}")
            self._state = self._between
        return True

    def _skip(self) -> bool:
        end = self._value.take(self._buffer)
        self._buffer = self._buffer[end:] if end else ""
        if end:
            self._state = self._between
        return bool(end)

    def _between(self) -> bool:
        """Behind a call: its closing tag, the next call, or text again."""
        dialect, solid = self._dialect, self._buffer.lstrip()
        if dialect.between and (match := dialect.between.match(self._buffer)):
            self._read_head(match[0], match.end())
            return True
        last = dialect.closing or ("]" if self._in_array else "")
        if last and solid.startswith(last):
            self._buffer, self._state = solid[len(last) :], self._text
            return True
        if not self._ended and (last.startswith(solid) or (dialect.between and MAYBE_BETWEEN.fullmatch(solid))):
            return False
        self._state = self._text
        return True


def json_string(text: str) -> str | None:
    """The string that a JSON literal spells, or None."""
    try:
        return msgspec.json.decode(text, type=str)
    except ValueError:
        return None


def whole_call(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON text) of an object that is a call, or None."""
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        return None
    return name, json.dumps(arguments or {}, ensure_ascii=False)
