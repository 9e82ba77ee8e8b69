"""The content of a message: deltas of a chat completion become content blocks and the events of a stream."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from quartet.http_gateway.anthropic.types import TextBlock, ThinkingBlock, ToolUseBlock
from quartet.http_gateway.http.sse import Event
from quartet.http_gateway.openai.answers import Delta, ToolCall
from quartet.http_gateway.parsers.json_text import JsonText, Piece

Kind = Literal["text", "thinking", "tool_use"]
INVALID = "INVALID_JSON"
CALL_PREFIX, TOOL_USE_PREFIX = "call_", "toolu_"  # of ids, in a chat completion and here


def named_event(name: str, **fields: Any) -> Event:
    """An event of a stream; its data repeat its type."""
    return Event(msgspec.json.encode({"type": name, **fields}), name.encode())


@dataclass
class Block:
    """One block, as far as it has been generated."""

    kind: Kind
    index: int
    id: str = ""  # of a tool call; so is the name
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    def empty(self) -> dict[str, Any]:
        """The block as content_block_start has it."""
        match self.kind:
            case "text":
                return {"type": self.kind, "text": ""}
            case "thinking":
                return {"type": self.kind, "thinking": "", "signature": ""}
            case "tool_use":
                return {"type": self.kind, "id": self.id, "name": self.name, "input": {}}

    def delta(self, text: str) -> dict[str, Any]:
        """The delta of a content_block_delta."""
        match self.kind:
            case "text":
                return {"type": "text_delta", "text": text}
            case "thinking":
                return {"type": "thinking_delta", "thinking": text}
            case "tool_use":
                return {"type": "input_json_delta", "partial_json": text}

    def content(self, signature: str) -> TextBlock | ThinkingBlock | ToolUseBlock:
        """The whole block."""
        text = "".join(self.pieces)
        match self.kind:
            case "text":
                return TextBlock(text)
            case "thinking":
                return ThinkingBlock(text, signature)
            case "tool_use":
                return ToolUseBlock(self.id, self.name, arguments_of(text))


class ContentBlocks:
    """The blocks of a message so far. Each one is started, extended and stopped before the next one starts."""

    def __init__(self, signature: str, *, include_thinking: bool = True) -> None:
        """`signature`: of thinking blocks, which some clients need. `include_thinking`: otherwise they are empty."""
        self._signature = signature
        self._include_thinking = include_thinking
        self._blocks: list[Block] = []

    def take(self, delta: Delta) -> Iterator[Event]:
        """Add a delta of the chat completion. Yields the events for it."""
        if delta.reasoning_content:
            yield from self._append("thinking", delta.reasoning_content)
        if delta.content:
            yield from self._append("text", delta.content)
        for piece in delta.tool_calls or ():
            yield from self._take_call(piece)

    def stop(self) -> Iterator[Event]:
        """The events that end the last block."""
        if not self._blocks:
            return
        last = self._blocks[-1]
        if last.kind == "thinking":
            delta = {"type": "signature_delta", "signature": self._signature}
            yield named_event("content_block_delta", index=last.index, delta=delta)
        yield named_event("content_block_stop", index=last.index)

    def content(self) -> list[TextBlock | ThinkingBlock | ToolUseBlock]:
        """The content of the whole message."""
        return [block.content(self._signature) for block in self._blocks]

    def _take_call(self, piece: ToolCall) -> Iterator[Event]:
        """A new call, or more arguments of the last one."""
        if piece.id is not UNSET:
            name = "" if piece.function.name is UNSET else piece.function.name
            yield from self._start("tool_use", call_id(piece.id), name)
        if piece.function.arguments:
            yield from self._append("tool_use", piece.function.arguments)

    def _start(self, kind: Kind, id: str = "", name: str = "") -> Iterator[Event]:
        yield from self.stop()
        block = Block(kind, len(self._blocks), id, name)
        self._blocks.append(block)
        yield named_event("content_block_start", index=block.index, content_block=block.empty())

    def _append(self, kind: Kind, text: str) -> Iterator[Event]:
        if not self._blocks or self._blocks[-1].kind != kind:
            yield from self._start(kind)
        if kind == "thinking" and not self._include_thinking:
            return
        block = self._blocks[-1]
        block.pieces.append(text)
        yield named_event("content_block_delta", index=block.index, delta=block.delta(text))


def call_id(id: str) -> str:
    """The id with this API's prefix; ids in a format of the model's own stay."""
    return TOOL_USE_PREFIX + id.removeprefix(CALL_PREFIX) if id.startswith(CALL_PREFIX) else id


def arguments_of(text: str) -> dict[str, Any]:
    """The arguments of a call. Truncated at the length limit, they are the members that are complete.

    A model may write what is no JSON object; that comes under a key that models of this API know.
    """
    for mend in (str, closed):
        with suppress(msgspec.DecodeError, RecursionError):
            return msgspec.json.decode(mend(text), type=dict[str, Any])
    return {INVALID: text}


def closed(text: str) -> str:
    """A truncated JSON object, shortened to its last complete member and closed; `{}` where there is none."""
    end = 0
    for piece, start in pieces(JsonText(), text):
        if piece.kind in ("open", "close"):
            end = piece.end
        elif piece.kind == "mark" and piece.text == ",":
            end = start
    kept, reading = text[:end], JsonText()
    for _ in pieces(reading, kept):
        pass
    return kept + reading.closers or "{}"


def pieces(reading: JsonText, text: str) -> Iterator[tuple[Piece, int]]:
    """The pieces of a text, each with its start."""
    at = 0
    while at < len(text):
        piece = reading.next(text, at)
        yield piece, at
        at = piece.end
