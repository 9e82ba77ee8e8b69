"""One tool call that is written in Python: `get_weather(city="Ulm", days=3)`. Read, never run."""

import json
import re
from collections.abc import Callable, Collection
from typing import Any

from quartet.http_gateway.parsers.tool_events import CALL, NO_CALL, Events, Outcome

NAME_CHARS = re.compile(r"[\w.]+")
BLANKS = re.compile(r"\s+")
OUTSIDE = re.compile(r"[^\[\]{}()'\"]+")
INSIDE = {quote: re.compile(rf"[^\\{quote}]+") for quote in "'\""}
TOKEN = re.compile(
    r"""\s*(?:(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
      | (?P<number>-?\s*(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<word>[^\W\d]\w*)
      | (?P<sign>[\[\](){}:,=]))""",
    re.VERBOSE | re.DOTALL,
)
ESCAPE = re.compile(
    r"\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<o>[0-7]{1,3})|(?P<c>.))", re.DOTALL
)
SURROGATE = re.compile(r"[\ud800-\udfff]")
ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\n": ""}
UNCHANGED = "\\'\""
WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
CLOSERS = {"[": "]", "(": ")", "{": "}"}
MAX_DEPTH = 64


class PythonCall:
    """Reads one call; it is announced when its parenthesis closes. See JsonCall for `outcome` and `raw`."""

    def __init__(self, known: Collection[str], events: Events) -> None:
        self.outcome: Outcome | None = None
        self.raw: list[str] = []
        self.announced = False
        self._known = known
        self._events = events
        self._name = ""
        self._named = False  # nothing but blanks may stand before the parenthesis
        self._body: list[str] | None = None  # what stands in the parenthesis, once that is open
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def take(self, text: str, at: int) -> int:
        """Read on from `at`; where what follows is not of this call, or the text ends."""
        start = at
        while at < len(text) and self.outcome is None:
            at = self._in_name(text, at) if self._body is None else self._in_body(text, at, self._body)
        self.raw.append(text[start:at])
        return at

    def _in_name(self, text: str, at: int) -> int:
        match = None if self._named else NAME_CHARS.match(text, at)
        if match and len(self._name) + len(match[0]) <= max(map(len, self._known), default=0):
            self._name += match[0]
            return match.end()
        if self._name and (blanks := BLANKS.match(text, at)):
            self._named = True
            return blanks.end()
        if text[at] == "(" and self._name in self._known:
            self._depth, self._body = 1, []
            return at + 1
        self.outcome = NO_CALL
        return at

    def _in_body(self, text: str, at: int, body: list[str]) -> int:
        end = self._run(text, at)
        if self._depth:
            body.append(text[at:end])
        else:
            self._tell("".join(body))
        return end

    def _run(self, text: str, at: int) -> int:
        """Where the next run of characters of one kind ends."""
        character = text[at]
        if self._escaped:
            self._escaped = False
        elif self._quote:
            if match := INSIDE[self._quote].match(text, at):
                return match.end()
            if character == "\\":
                self._escaped = True
            else:
                self._quote = ""
        elif match := OUTSIDE.match(text, at):
            return match.end()
        elif character in "'\"":
            self._quote = character
        else:
            self._depth += 1 if character in CLOSERS else -1
        return at + 1

    def _tell(self, body: str) -> None:
        arguments = json_arguments(body)
        self.outcome = NO_CALL if arguments is None else CALL
        if arguments is not None:
            self.announced = True
            self._events.start(self._name)
            self._events.arguments(arguments)


def json_arguments(body: str) -> str | None:
    """The arguments `key=literal, ...` as JSON text, or None where they are anything else."""
    return as_json(Literals(body).arguments)


def json_literal(text: str) -> str | None:
    """A list or dictionary of literals as JSON text, or None where it is anything else."""
    return as_json(Literals(text).nested)


def as_json(read: Callable[[], Any]) -> str | None:
    """What a reader finds as JSON text; None where it raises ValueError, or JSON cannot hold what it finds."""
    try:
        found = json.dumps(read(), ensure_ascii=False, allow_nan=False)
        found.encode()  # a lone surrogate has no place on the wire
    except (ValueError, OverflowError, RecursionError):
        return None
    return found


class Literals:
    """A reader of Python literals, from left to right. Its methods raise ValueError for anything else."""

    def __init__(self, text: str) -> None:
        self._text = text.rstrip()
        self._at = 0
        self._depth = 0

    def arguments(self) -> dict[str, Any]:
        """The arguments by name. Raises ValueError for what is no list of named literals."""
        found: dict[str, Any] = {}
        while self._at < len(self._text):
            name = self._token()
            if name.lastgroup != "word" or name[name.lastgroup] in found:
                raise ValueError("an argument needs a name of its own")
            self._expect("=")
            found[name["word"]] = self._value(self._token())
            if self._at < len(self._text):
                self._expect(",")
        return found

    def nested(self) -> Any:
        """The whole text as one list or dictionary. Raises ValueError for anything else."""
        value = self._value(self._token())
        if self._at < len(self._text) or not isinstance(value, list | dict):
            raise ValueError("no list and no dictionary")
        return value

    def _token(self) -> re.Match[str]:
        match = TOKEN.match(self._text, self._at)
        if match is None:
            raise ValueError(f"no literal at {self._at}")
        self._at = match.end()
        return match

    def _expect(self, sign: str) -> None:
        if self._token()["sign"] != sign:
            raise ValueError(f"{sign} is missing at {self._at}")

    def _value(self, token: re.Match[str]) -> Any:
        match token.lastgroup:
            case "string":
                return self._strings(token["string"])
            case "number":
                return number(token["number"])
            case "word" if token["word"] in WORDS:
                return WORDS[token["word"]]
            case "sign" if token["sign"] in CLOSERS:
                return self._nested(token["sign"])
        raise ValueError(f"not a literal at {self._at}")

    def _strings(self, first: str) -> str:
        """A string, and those that stand right behind it: Python joins them."""
        parts = [unquoted(first)]
        while (match := TOKEN.match(self._text, self._at)) and match["string"]:
            self._at = match.end()
            parts.append(unquoted(match["string"]))
        return "".join(parts)

    def _nested(self, opener: str) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        found = self._dict() if opener == "{" else self._list(CLOSERS[opener])
        self._depth -= 1
        return found

    def _list(self, closer: str) -> Any:
        items: list[Any] = []
        comma = False
        while (token := self._token())["sign"] != closer:
            items.append(self._value(token))
            comma = (behind := self._token())["sign"] == ","
            if behind["sign"] == closer:
                break
            if not comma:
                raise ValueError(f"a comma is missing at {self._at}")
        return items[0] if closer == ")" and len(items) == 1 and not comma else items

    def _dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while (token := self._token())["sign"] != "}":
            if token.lastgroup != "string":
                raise ValueError("a key must be a string")
            key = self._strings(token["string"])
            self._expect(":")
            found[key] = self._value(self._token())
            behind = self._token()["sign"]
            if behind == "}":
                break
            if behind != ",":
                raise ValueError(f"a comma is missing at {self._at}")
        return found


def number(text: str) -> int | float:
    plain = "".join(text.split()).replace("_", "")
    return float(plain) if set(plain) & set(".eE") else int(plain)


def unquoted(literal: str) -> str:
    """What a string literal spells; an unknown escape stands for itself, as in Python.

    Two surrogates are one character, as in JSON, which models have seen more of. Raises ValueError for a lone one.
    """
    text = ESCAPE.sub(spelled, literal[1:-1])
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le") if SURROGATE.search(text) else text


def spelled(escape: re.Match[str]) -> str:
    if code := escape["x"] or escape["u"] or escape["U"]:
        return chr(int(code, 16))
    if escape["o"]:
        return chr(int(escape["o"], 8))
    character = escape["c"]
    return character if character in UNCHANGED else ESCAPED.get(character, escape[0])
