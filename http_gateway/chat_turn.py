"""The model's turn in a conversation: its text, piece by piece, becomes thought, content and tool calls.

A turn does not know whether it is streamed: what it reads becomes deltas, and a message is its deltas joined.
"""

from collections.abc import Iterable, Iterator

from http_gateway.openai_answers import CalledFunction, ChatMessage, Delta, ToolCall
from http_gateway.reasoning import ReasoningParser, Split
from http_gateway.tool_events import Arguments, CallStart, Content, Event, Parser, call_id


class Turn:
    """Reads one output."""

    def __init__(
        self, reasoning: ReasoningParser | None = None, tools: Parser | None = None, *, stream_reasoning: bool = True
    ) -> None:
        """No parser: what it would find stays in the content. The thought comes in one piece unless streamed."""
        self.called = False  # a tool call was found
        self._reasoning = reasoning
        self._tools = tools
        self._stream_reasoning = stream_reasoning
        self._thought = ""  # kept back until it is whole

    @property
    def thinking(self) -> bool:
        return self._reasoning is not None and self._reasoning.thinking

    def read(self, text: str, last: bool) -> list[Delta]:
        """The deltas that the next characters decide; `last`: no more will come."""
        return [delta for split in self._splits(text, last) for delta in self._deltas(split)] + self._end(last)

    def _splits(self, text: str, last: bool) -> Iterator[Split]:
        if self._reasoning is None:
            yield Split(content=text)
            return
        yield self._reasoning.feed(text)
        if last:
            yield self._reasoning.finish()

    def _deltas(self, split: Split) -> Iterator[Delta]:
        self._thought += split.reasoning
        if self._thought and (self._stream_reasoning or not self.thinking):
            yield Delta(reasoning_content=self._thought)
            self._thought = ""
        if split.content:
            yield from self._content(split.content)

    def _content(self, text: str) -> Iterator[Delta]:
        if self._tools is None:
            yield Delta(content=text)
        else:
            yield from map(self._delta_of, self._tools.feed(text))

    def _end(self, last: bool) -> list[Delta]:
        if not last:
            return []
        rest = [Delta(reasoning_content=self._thought)] if self._thought else []
        return rest + ([self._delta_of(event) for event in self._tools.finish()] if self._tools else [])

    def _delta_of(self, event: Event) -> Delta:
        match event:
            case Content(text):
                return Delta(content=text)
            case CallStart(index, name):
                self.called = True
                return Delta(tool_calls=[ToolCall(id=call_id(), index=index, function=CalledFunction(name, ""))])
            case Arguments(index, text):
                return Delta(tool_calls=[ToolCall(id=None, index=index, function=CalledFunction(None, text))])


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas, with neighbours of one kind joined."""
    made: list[Delta] = []
    for delta in deltas:
        if not (made and join(made[-1], delta)):
            made.append(delta)
    return made


def join(left: Delta, right: Delta) -> bool:
    """Put `right` behind `left` where both go on with the same thing."""
    if left.content is not None and right.content is not None:
        left.content += right.content
    elif left.reasoning_content is not None and right.reasoning_content is not None:
        left.reasoning_content += right.reasoning_content
    elif left.tool_calls and right.tool_calls and right.tool_calls[0].id is None and left.tool_calls[0].id is None:
        left.tool_calls[0].function.arguments += right.tool_calls[0].function.arguments
    else:
        return False
    return True


def message_of(deltas: Iterable[Delta]) -> ChatMessage:
    """The whole message; its content is null where there are calls only."""
    content, thought = "", ""
    calls: list[ToolCall] = []
    for delta in deltas:
        content += delta.content or ""
        thought += delta.reasoning_content or ""
        for piece in delta.tool_calls or ():
            if piece.id is not None:
                calls.append(piece)
            else:
                calls[piece.index].function.arguments += piece.function.arguments
    return ChatMessage(
        content=content or (None if calls or thought else ""),
        reasoning_content=thought or None,
        tool_calls=calls or None,
    )
