"""One tool call whose parameters stand between tags: `<function=f><parameter=a>1</parameter></function>`."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from quartet.http_gateway.parsers.pythonic_calls import json_literal
from quartet.http_gateway.parsers.tag_search import held_back
from quartet.http_gateway.parsers.tool_events import CALL, NO_CALL, Events, Outcome

CHUNK_CHARS = 4096  # read at once, so that a call costs what it is long, however much text follows
KINDS = {  # type of a value → how schemas call it
    bool: {"boolean"},
    dict: {"object"},
    float: {"number"},
    int: {"integer", "number"},
    list: {"array"},
    str: {"string"},
    type(None): {"null"},
}
MAX_SCHEMA_DEPTH = 3  # of alternatives in alternatives
MAX_ALTERNATIVES = 32  # that are looked at for the types of a parameter
PLAIN_NAME = re.compile(r"[\w.\-]*")


@dataclass(frozen=True)
class Tags:
    """The tags of a call, in their order."""

    name_begin: str  # "": the name follows the format's opening
    name_end: str  # "": a blank or a tag ends it
    key_begin: str
    key_end: str
    value_begin: str  # "": the value follows the key's end
    value_end: str
    end: str  # of the call, "": the format's closing ends it
    own_lines: bool = False  # a value stands on lines of its own
    text_begin: str = ""  # in place of `value_begin` before a value that is text, whatever its schema says


class TaggedCall:
    """Reads one call. See JsonCall for `outcome` and `raw`. A value streams where the schema says that it is text."""

    def __init__(
        self,
        known: Collection[str],
        events: Events,
        tags: Tags,
        closing: str,
        schemas: Mapping[str, Any],
        begun: bool = False,
    ) -> None:
        """`closing`: the tag behind a call. `schemas`: of the parameters, by the tool's name.

        `begun`: what stands before the name was read already.
        """
        self.outcome: Outcome | None = None
        self.raw: list[str] = []
        self.announced = False
        self.unread = ""  # text taken earlier that belongs to what follows
        self._known = known
        self._events = events
        self._tags = tags
        self._end = tags.end or closing
        self._schemas = schemas
        self._properties: Mapping[str, Any] = {}
        self._buffer = ""  # taken and not yet understood; shorter than a tag or a name between two calls of `take`
        self._begun = begun
        self._step = self._in_name if begun else self._begin
        self._key: list[str] = []
        self._keys = 0
        self._value: list[str] = []  # of one that is no text
        self._kinds = set[str]()  # of the value, as the schema says
        self._streams = self._at_start = False

    def take(self, text: str, at: int) -> int:
        """Read on from `at`; where what follows is not of this call, or what was read now ends."""
        piece = text[at : at + CHUNK_CHARS]
        self._buffer += piece
        while self.outcome is None and self._step():
            pass
        left = 0 if self.outcome is None else len(self._buffer)
        if self.outcome is None and not self.announced:
            self.raw.append(piece)
        if left > len(piece):
            self.unread = self._buffer[: left - len(piece)]
            left = len(piece)
        return at + len(piece) - left

    def flush(self) -> None:
        """The output is over amid an announced call: give what was held, as the beginning of JSON."""
        if self._step == self._in_key:
            self._tell(", " * (self._keys > 0) + '"' + escaped("".join(self._key) + self._buffer))
        elif self._step == self._in_value:
            held = "".join(self._value) + self._buffer
            self._tell(escaped(held) if self._streams else '"' + escaped(held))
        self._buffer = ""

    # Each step takes from the buffer; False: it needs more text.

    def _begin(self) -> bool:
        tag = self._tags.name_begin
        if self._buffer.startswith(tag):
            self._buffer, self._step = self._buffer[len(tag) :], self._in_name
            return True
        return self._no_call() if not tag.startswith(self._buffer) else False

    def _in_name(self) -> bool:
        end = self._tags.name_end
        match = PLAIN_NAME.match(self._buffer)
        name = match[0] if match else ""
        if len(name) > max(map(len, self._known), default=0):
            return self._no_call()
        behind = self._buffer[len(name) :]
        if not behind or (end and end != behind[: len(end)] and end.startswith(behind)):
            return False
        if name not in self._known or not (behind.startswith(end) if end else behind[0] == "<" or behind[0].isspace()):
            return self._no_call()
        schema = self._schemas.get(name)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        self._properties = properties if isinstance(properties, Mapping) else {}
        self._events.start(name)
        self.announced, self.raw = True, []
        self._tell("{")
        self._buffer, self._step = behind[len(end) :], self._in_body
        return True

    def _in_body(self) -> bool:
        """Blanks, then the next key or the end. Anything else ends the call too."""
        tags, rest = self._tags, self._buffer.lstrip()
        if rest.startswith(tags.key_begin):
            self._buffer, self._key, self._step = rest[len(tags.key_begin) :], [], self._in_key
            return True
        if tags.key_begin.startswith(rest) or (self._end.startswith(rest) and rest != self._end):
            self._buffer = rest
            return False
        self._buffer = rest.removeprefix(tags.end) if tags.end else rest
        self._tell("}")
        self.outcome = CALL
        return True

    def _in_key(self) -> bool:
        if not self._upto((self._tags.key_end,), self._key):
            return False
        self._step = self._before_value
        return True

    def _before_value(self) -> bool:
        tags = self._tags.value_begin, self._tags.text_begin
        rest = self._buffer.lstrip() if tags[0] else self._buffer
        if any(tag.startswith(rest) and rest != tag for tag in tags if tag):
            self._buffer = rest
            return False
        found = next((tag for tag in tags if tag and rest.startswith(tag)), "")
        self._buffer = rest.removeprefix(found)
        key = "".join(self._key)
        self._tell(", " * (self._keys > 0) + json.dumps(key, ensure_ascii=False) + ": ")
        self._keys += 1
        self._kinds = kinds_of(self._properties.get(key)) if not self._tags.text_begin else set()
        self._streams = self._kinds == {"string"} or found == self._tags.text_begin != ""
        if self._streams:
            self._tell('"')
        self._value, self._at_start, self._step = [], self._tags.own_lines, self._in_value
        return True

    def _in_value(self) -> bool:
        end = self._tags.value_end
        if self._at_start:
            if not self._buffer:
                return False
            self._at_start = False
            self._buffer = self._buffer.removeprefix("\n")
        found = self._upto(("\n" + end, end) if self._tags.own_lines else (end,), self._value)
        if self._streams:
            self._tell(escaped("".join(self._value)) + '"' * found)
            self._value = []
        elif found:
            self._tell(json_value("".join(self._value), self._kinds))
            self._value = []
        if found:
            self._step = self._in_body
        return found

    def _upto(self, tags: tuple[str, ...], into: list[str]) -> bool:
        """Move the buffer's text into a list, up to a tag, which is dropped; whether there was one."""
        places = [(place, tag) for tag in tags if (place := self._buffer.find(tag)) >= 0]
        if places:
            place, tag = min(places)
            into.append(self._buffer[:place])
            self._buffer = self._buffer[place + len(tag) :]
            return True
        keep = len(self._buffer) - held_back(self._buffer, 0, *tags)
        into.append(self._buffer[:keep])
        self._buffer = self._buffer[keep:]
        return False

    def _no_call(self) -> bool:
        """All that was read may hold the opening of another call: it belongs to what follows."""
        if self._step == self._in_name and not self._begun:
            self._buffer = self._tags.name_begin + self._buffer
        self.outcome, self.raw = NO_CALL, []
        return False

    def _tell(self, text: str) -> None:
        self._events.arguments(text)


def escaped(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def kinds_of(schema: Any, depth: int = 0) -> set[str]:
    """The JSON types that a parameter's schema names, also in alternatives; empty where it leaves one open."""
    if not isinstance(schema, Mapping) or depth > MAX_SCHEMA_DEPTH:
        return set()
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return {kinds}
    if isinstance(kinds, list):
        return {str(kind) for kind in kinds}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return set[str]().union(*(KINDS[type(value)] for value in values[:MAX_ALTERNATIVES]))
    options = schema.get("anyOf") or schema.get("oneOf")
    found = [kinds_of(option, depth + 1) for option in options[:MAX_ALTERNATIVES]] if isinstance(options, list) else []
    return set[str]().union(*found) if all(found) else set()


def json_value(text: str, kinds: set[str]) -> str:
    """A value as JSON: as it is where that is JSON of a type that the schema allows, else a string.

    Lists and objects may be written in Python.
    """
    plain = text.strip()
    if "boolean" in kinds and plain in ("True", "False"):  # as models write them that think in Python
        return plain.lower()
    try:
        value = msgspec.json.decode(plain)
    except (ValueError, RecursionError):
        literal = json_literal(plain) if kinds & {"array", "object"} else None
        return literal or json.dumps(text, ensure_ascii=False)
    allowed = not kinds & {"string"} or (kinds & KINDS[type(value)] and not isinstance(value, str))  # with its quotes
    return plain if allowed else json.dumps(text, ensure_ascii=False)
