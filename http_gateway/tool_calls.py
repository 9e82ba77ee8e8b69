"""Finds tool calls in a model's output, piece by piece as it streams.

A parser turns text into events: content, the start of a call, a piece of its arguments. The events of a whole output
do not depend on where it was cut. What is no well-formed call of a known tool stays content, to the last character;
blanks beside a call belong to nobody and are dropped. Once a call's name and the opening of its arguments are read it
is announced, and what follows streams through as it comes.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from http_gateway.held_back import held_back
from runtime.errors import RequestError


class Function(msgspec.Struct, omit_defaults=True):
    """What a client says about one of its functions."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    function: Function
    type: Literal["function"] = "function"

    def plain(self) -> dict[str, Any]:
        """The tool as chat templates print it."""
        return {"type": self.type, "function": msgspec.to_builtins(self.function)}


class Content(NamedTuple):
    """Text that belongs to no call."""

    text: str


class CallStart(NamedTuple):
    """A call begins; its arguments follow."""

    index: int
    name: str


class Arguments(NamedTuple):
    """The next characters of a call's arguments, JSON once they are joined."""

    index: int
    text: str


Event = Content | CallStart | Arguments


class Parser(Protocol):
    """Reads one output."""

    def feed(self, delta: str) -> list[Event]:
        """Take the next characters; give the events they decide."""

    def finish(self) -> list[Event]:
        """The output is over: give what was held back."""


def call_id() -> str:
    """A fresh id of a call."""
    return f"call_{secrets.token_hex(12)}"


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


class Events:
    """Collects events; keeps blanks back until it is known whether they stand beside a call."""

    def __init__(self) -> None:
        self.calls = 0
        self._blanks = ""
        self._beside_call = False  # nothing but blanks since the last call
        self._made: list[Event] = []

    def content(self, text: str) -> None:
        text = self._blanks + text
        solid = text.rstrip()
        self._blanks = text[len(solid) :]
        if solid:
            self._made.append(Content(solid))
            self._beside_call = False

    def start(self, name: str) -> None:
        self._blanks = ""
        self._made.append(CallStart(self.calls, name))
        self.calls += 1
        self._beside_call = True

    def arguments(self, text: str) -> None:
        if text:
            self._made.append(Arguments(self.calls - 1, text))

    def finish(self) -> None:
        if self._blanks and not self._beside_call:
            self._made.append(Content(self._blanks))
        self._blanks = ""

    def take(self) -> list[Event]:
        made, self._made = self._made, []
        return made


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
FIRST_KEY = re.compile(rf"\s*\{{\s*({STRING})\s*:", re.DOTALL)
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
        self._state: Callable[[], bool] = self._text

    def feed(self, delta: str) -> list[Event]:
        self._buffer += delta
        while self._buffer and self._state():
            pass
        return self._events.take()

    def finish(self) -> list[Event]:
        self._ended = True
        while self._buffer and self._state():
            pass
        self._events.finish()
        return self._events.take()

    # Each state reads from the buffer; it returns False when it needs more, True when another turn may help.

    def _text(self) -> bool:
        dialect, buffer = self._dialect, self._buffer
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
        self._opening, self._buffer = tag, self._buffer[len(tag) :]
        self._in_array = False
        self._state = self._head
        return bool(self._buffer) or self._wait()

    def _wait(self) -> bool:
        """Nothing more to read: an opening at the very end of the output is content."""
        return self._reject() if self._ended else False

    def _head(self) -> bool:
        solid = self._buffer.lstrip()
        if not solid:
            return self._wait()
        if self._dialect.array and not self._in_array and solid[0] == "[":
            self._opening += self._buffer[: len(self._buffer) - len(solid) + 1]
            self._buffer = solid[1:]
            self._in_array = True
            return bool(self._buffer) or self._wait()
        if solid[0] != "{":
            return self._named_head()
        if match := HEAD.match(self._buffer):
            return self._announce(json_string(match[1]), match.end())
        if (key := FIRST_KEY.match(self._buffer)) and json_string(key[1]) not in KEYS:
            return self._reject()
        end = JsonValue().take(self._buffer)
        return self._whole(end) if end else self._wait()

    def _named_head(self) -> bool:
        if not self._dialect.named or self._in_array:
            return self._reject()
        if match := NAMED_HEAD.match(self._buffer):
            self._bare_body = True
            return self._announce(match[1], match.end())
        hopeful = re.fullmatch(r"\s*[\w.-]+(\[[\w\]]*)?\s*", self._buffer)
        return self._wait() if hopeful else self._reject()

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
            self._opening, self._buffer = match[0], self._buffer[match.end() :]
            self._state = self._head
            return True
        last = dialect.closing or ("]" if self._in_array else "")
        if last and solid.startswith(last):
            self._buffer, self._state = solid[len(last) :], self._text
            return True
        hopeful = last.startswith(solid) or (dialect.between and re.fullmatch(r"[;,]?\s*[<|\w]*", solid))
        if hopeful and not self._ended:
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


class Call(NamedTuple):
    name: str
    arguments: str


class Parsed(NamedTuple):
    """A whole output: its content, and its calls in order."""

    content: str
    calls: list[Call]


def collect(events: Iterable[Event]) -> Parsed:
    """The output that these events describe."""
    content, names, arguments = "", list[str](), list[str]()
    for event in events:
        match event:
            case Content(text):
                content += text
            case CallStart(_, name):
                names.append(name)
                arguments.append("")
            case Arguments(index, text):
                arguments[index] += text
    return Parsed(content, [Call(*pair) for pair in zip(names, arguments, strict=True)])


def known_names(tools: Sequence[Tool]) -> list[str]:
    return [tool.function.name for tool in tools]
