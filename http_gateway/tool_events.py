"""What a tool parser tells the endpoint: content, the start of a call, a piece of its arguments."""

import secrets
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import msgspec


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


class Content(msgspec.Struct, frozen=True):
    """Text that belongs to no call."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A call begins; its arguments follow."""

    index: int
    name: str


class Arguments(msgspec.Struct, frozen=True):
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
