"""The model's turn in a conversation: its text, piece by piece, becomes thought, content and tool calls.

A turn does not know whether it is streamed: what it reads becomes deltas, and a message is its deltas joined.
"""

import re
from collections.abc import Callable, Iterable
from itertools import groupby

from msgspec import UNSET

from quartet.http_gateway.openai.answers import CalledFunction, ChatMessage, Delta, ToolCall
from quartet.http_gateway.parsers.call_formats import call_id
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.tool_events import Arguments, CallStart, Content, Event, Thought
from quartet.http_gateway.parsers.untagged_calls import UntaggedCalls
from quartet.runtime.messages import Place

USUAL_ID = re.compile("[A-Za-z0-9]{9}")  # of a call, as models write them that do: the prefix cache finds it again


class Turn:
    """Reads one output."""

    def __init__(
        self,
        reader: OutputReader | None = None,
        *,
        untagged: UntaggedCalls | None = None,
        stream_reasoning: bool = True,
        separate_reasoning: bool = True,
        most_calls: int | None = None,
        new_id: Callable[[], str] = call_id,
    ) -> None:
        """No reader: all is content. A thought that is not streamed comes in one piece. Further calls are dropped.

        `untagged`: finds calls that stand without their tags.
        """
        self.called = False  # a tool call was found
        self._reader = reader
        self._untagged = untagged
        self._stream_reasoning = stream_reasoning
        self._separate_reasoning = separate_reasoning
        self._most_calls = most_calls
        self._new_id = new_id
        self._ids: set[str] = set()
        self._thought: list[str] = []  # kept back until it is whole
        self._begun = False
        self._dropping = False  # the calls from here on

    @property
    def thinking(self) -> bool:
        return self._reader is not None and self._reader.thinking

    @property
    def cut(self) -> bool:
        """The output has ended amid the arguments of a call that is passed on."""
        return self._reader is not None and self._reader.cut and not self._dropping

    def begin(self, place: Place) -> None:
        """Where the prompt has left the model's thought; said again after a restart, and known by then."""
        if self._reader is not None and not self._begun:
            self._reader.begin(place)

    def read(self, text: str, last: bool) -> list[Delta]:
        """The deltas that the next characters decide; `last`: no more will come."""
        if self._reader is None:
            return [Delta(content=text)] if text else []
        self._begun = self._begun or bool(text)
        events = self._reader.feed(text)
        if last:
            events += self._reader.finish()
        if self._untagged is not None:
            events = self._untagged.read(events, last)
        deltas = [delta for event in events for delta in self._deltas_of(event)]
        return deltas + (self._whole_thought() if last else [])

    def _deltas_of(self, event: Event) -> list[Delta]:
        match event:
            case Thought(text) if self._separate_reasoning:
                self._thought.append(text)
                return self._whole_thought() if self._stream_reasoning else []
            case Thought(text):
                return [Delta(content=text)]
        delta = self._delta_of(event)
        return self._whole_thought() + ([] if delta is None else [delta])

    def _whole_thought(self) -> list[Delta]:
        thought, self._thought = "".join(self._thought), []
        return [Delta(reasoning_content=thought)] if thought else []

    def _delta_of(self, event: Content | CallStart | Arguments) -> Delta | None:
        match event:
            case Content(text):
                return Delta(content=text)
            case CallStart(index) | Arguments(index) if self._most_calls is not None and index >= self._most_calls:
                self._dropping = True
                return None
            case CallStart(index, name, given):
                self.called = True
                call_id = given if given and USUAL_ID.fullmatch(given) and given not in self._ids else self._new_id()
                self._ids.add(call_id)
                return Delta(tool_calls=[ToolCall(id=call_id, index=index, function=CalledFunction("", name))])
            case Arguments(index, text):
                return Delta(tool_calls=[continued(index, text)])


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas, with neighbours of one kind joined."""
    return [joined(list(group)) for _, group in groupby(deltas, key=kind_of)]


def kind_of(delta: Delta) -> object:
    """Equal for neighbours that go on with the same thing."""
    if delta.content is not None:
        return "content"
    if delta.reasoning_content is not None:
        return "thought"
    if delta.tool_calls and delta.tool_calls[0].id is UNSET:
        return delta.tool_calls[0].index
    return id(delta)


def joined(deltas: list[Delta]) -> Delta:
    """One delta of several that are of one kind."""
    first = deltas[0]
    if len(deltas) == 1:
        return first
    if first.content is not None:
        return Delta(content="".join(delta.content or "" for delta in deltas))
    if first.reasoning_content is not None:
        return Delta(reasoning_content="".join(delta.reasoning_content or "" for delta in deltas))
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    return Delta(tool_calls=[continued(pieces[0].index, "".join(piece.function.arguments for piece in pieces))])


def continued(index: int, arguments: str) -> ToolCall:
    """A later piece of a call."""
    return ToolCall(index=index, type=UNSET, function=CalledFunction(arguments))


def message_of(deltas: Iterable[Delta]) -> ChatMessage:
    """The whole message; its content is null where there are calls only."""
    content, thought = list[str](), list[str]()
    calls: list[ToolCall] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        content.append(delta.content or "")
        thought.append(delta.reasoning_content or "")
        for piece in delta.tool_calls or ():
            if piece.id is not UNSET:
                calls.append(piece)
                arguments.append([])
            arguments[piece.index].append(piece.function.arguments)
    for call, parts in zip(calls, arguments, strict=True):
        call.function.arguments = "".join(parts)
    said, thought_of = "".join(content), "".join(thought)
    return ChatMessage(
        content=said or (None if calls or thought_of else ""),
        reasoning_content=thought_of or None,
        tool_calls=calls or None,
    )
