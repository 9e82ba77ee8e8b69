"""What the reader of an output tells the endpoint: thought, content, the start of a call, a piece of its arguments."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

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


class Thought(msgspec.Struct, frozen=True):
    """Text of the model's thought."""

    text: str


class Content(msgspec.Struct, frozen=True):
    """Text that belongs to no thought and to no call."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A call begins; its arguments follow. `id`: as the model writes it, where it does."""

    index: int
    name: str
    id: str | None = None


class Arguments(msgspec.Struct, frozen=True):
    """The next characters of a call's arguments, JSON once they are joined."""

    index: int
    text: str


Event = Thought | Content | CallStart | Arguments


Outcome = Literal["call", "no call"]  # of reading what may be a call
CALL: Outcome = "call"
NO_CALL: Outcome = "no call"


class Events:
    """Collects events; keeps blanks back until it is known whether they stand beside a call or a thought's tags."""

    def __init__(self) -> None:
        self.calls = 0
        self.next_id: str | None = None  # of the call that starts next, where the model writes one
        self._blanks: list[str] = []
        self._drop_blanks = False  # at the end: nothing but blanks since the last call
        self._bare = False  # nothing but blanks since a tag of the thought: they belong to nobody
        self._last: type[Content] | type[Thought] | None = None  # what was said last, unless a call followed
        self._apart = False  # from what was said before
        self._made: list[Event] = []

    def content(self, text: str, hold: bool = True) -> None:
        """`hold`: a call or a tag may follow, so blanks at the end wait."""
        self._text(text, Content, hold)

    def thought(self, text: str) -> None:
        self._text(text, Thought, True)

    def _text(self, text: str, kind: type[Content] | type[Thought], hold: bool) -> None:
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        solid = text.rstrip() if hold else text
        if solid:
            apart = "\n" if self._apart and self._last is kind else ""
            self._made.append(kind(apart + "".join(self._blanks) + solid))
            self._blanks, self._apart, self._last = [], False, kind
            self._drop_blanks = False
        if len(solid) < len(text):
            self._blanks.append(text[len(solid) :])

    def tag(self) -> None:
        """A tag of the thought: blanks on both sides of it are dropped."""
        self._blanks = []
        self._bare = True

    def message(self) -> None:
        """Another message begins: a line break sets it apart from one of its kind."""
        self.tag()
        self._apart = True

    def start(self, name: str) -> None:
        self._blanks, self._last = [], None
        self._bare = False
        self._made.append(CallStart(self.calls, name, self.next_id))
        self.next_id = None
        self.calls += 1
        self._drop_blanks = True

    def arguments(self, text: str) -> None:
        if text:
            self._made.append(Arguments(self.calls - 1, text))

    def finish(self, keep_blanks: bool) -> None:
        """The output is over. `keep_blanks`: it ends in content."""
        if self._blanks and keep_blanks and not self._drop_blanks:
            self._made.append(Content("".join(self._blanks)))
        self._blanks = []

    def take(self) -> list[Event]:
        made, self._made = self._made, []
        return made


class Call(NamedTuple):
    name: str
    arguments: str


class Parsed(NamedTuple):
    """A whole output: its content, its calls in order, its thought."""

    content: str
    calls: list[Call]
    thought: str = ""


def collect(events: Iterable[Event]) -> Parsed:
    """The output that these events describe."""
    content, thought, names = list[str](), list[str](), list[str]()
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Thought(text):
                thought.append(text)
            case CallStart(_, name):
                names.append(name)
                arguments.append([])
            case Arguments(index, text):
                arguments[index].append(text)
    calls = [Call(name, "".join(parts)) for name, parts in zip(names, arguments, strict=True)]
    return Parsed("".join(content), calls, "".join(thought))
