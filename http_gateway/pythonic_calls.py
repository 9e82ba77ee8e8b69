"""Tool calls written as a Python list: `[get_weather(city="Ulm", days=3), stop()]`. Read, never run."""

import ast
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from http_gateway.tool_events import Event, Events

OPENING = ("<|python_start|>", "")  # some models put tags around the list
CLOSING = "<|python_end|>"
HEAD = re.compile(r"\s*([^\W\d][\w.]*)\s*\(")
MAYBE_HEAD = re.compile(r"\s*([^\W\d][\w.]*\s*)?")
NAMES = {"true": True, "false": False, "null": None}  # JSON's words, which models mix in


class PythonicCalls:
    """A parser (see http_gateway.tool_events). A call is announced when its parenthesis closes."""

    def __init__(self, known: Iterable[str]) -> None:
        self._known = frozenset(known)
        self._events = Events()
        self._buffer = ""
        self._opening = ""  # what led here since the last call; content if no call follows
        self._ended = False
        self._name = ""
        self._scanned = 0  # characters of the buffer that the open call's scan has seen
        self._quote = ""
        self._depth = 0
        self._state: Callable[[], bool] = self._start

    def feed(self, delta: str) -> list[Event]:
        self._buffer += delta
        while self._state():
            pass
        return self._events.take()

    def finish(self) -> list[Event]:
        self._ended = True
        while self._state():
            pass
        self._events.content(self._opening + self._buffer)
        self._events.finish()
        return self._events.take()

    def _move(self, count: int) -> None:
        """Structure that is content unless a call follows."""
        self._opening += self._buffer[:count]
        self._buffer = self._buffer[count:]

    def _start(self) -> bool:
        """The output is a list of calls, or it is text."""
        solid = self._buffer.lstrip()
        blanks = len(self._buffer) - len(solid)
        for tag in OPENING:
            if solid.startswith(f"{tag}["):
                self._move(blanks + len(tag) + 1)
                self._state = self._head
                return True
        if any(f"{tag}[".startswith(solid) for tag in OPENING):
            return False
        self._state = self._text
        return True

    def _text(self) -> bool:
        self._events.content(self._opening + self._buffer)
        self._opening = self._buffer = ""
        return False

    def _head(self) -> bool:
        if match := HEAD.match(self._buffer):
            if match[1] not in self._known:
                self._state = self._text
                return True
            self._name, self._scanned, self._depth, self._quote = match[1], match.end(), 1, ""
            self._state = self._call
            return True
        if not MAYBE_HEAD.fullmatch(self._buffer):
            self._state = self._text
            return True
        return False

    def _call(self) -> bool:
        while self._scanned < len(self._buffer):
            self._step()
            if self._depth == 0:
                return self._announce()
        return False

    def _step(self) -> None:
        """Look at one character of the open call, or at an escape and the character behind it."""
        character = self._buffer[self._scanned]
        self._scanned += 1
        if self._quote:
            if self._quote[0] == "\\":
                self._quote = self._quote[1:]
            elif character == "\\":
                self._quote = "\\" + self._quote
            elif character == self._quote:
                self._quote = ""
        elif character in "'\"":
            self._quote = character
        elif character in "([{":
            self._depth += 1
        elif character in ")]}":
            self._depth -= 1

    def _announce(self) -> bool:
        arguments = json_arguments(self._buffer[: self._scanned])
        if arguments is None:
            self._state = self._text
            return True
        self._events.start(self._name)
        self._events.arguments(arguments)
        self._buffer, self._opening = self._buffer[self._scanned :], ""
        self._state = self._between
        return True

    def _between(self) -> bool:
        solid = self._buffer.lstrip()
        if not solid:
            if self._ended:
                self._buffer = ""
            return False
        self._move(len(self._buffer) - len(solid) + 1)
        if solid[0] == ",":
            self._state = self._head
        elif solid[0] == "]":
            self._opening = ""
            self._state = self._end
        else:
            self._state = self._text
        return True

    def _end(self) -> bool:
        """Behind the list: the closing tag, or text."""
        solid = self._buffer.lstrip()
        if CLOSING.startswith(solid) and solid != CLOSING and not self._ended:
            return False
        if solid.startswith(CLOSING):
            self._buffer = solid[len(CLOSING) :]
        self._state = self._text
        return True


def json_arguments(text: str) -> str | None:
    """The arguments of `name(key=literal, ...)` as JSON text, or None where it is anything else."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords if keyword.arg}
        if len(arguments) != len(call.keywords):
            return None
        found = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        found.encode()  # a lone surrogate has no place on the wire
        return found
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """The JSON value that a Python literal spells. Raises ValueError for anything else."""
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=name) if name in NAMES:
            return NAMES[name]
    raise ValueError(f"not a literal: {type(node).__name__}")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str() as value):
            return value
    raise ValueError("a key must be a string")
