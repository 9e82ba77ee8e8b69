"""The items of a response, as /v1/responses has them: thoughts, messages and calls of functions, in their order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from quartet.http_gateway.http.sse import Event
from quartet.http_gateway.openai.answers import Delta, ToolCall
from quartet.http_gateway.openai.response_tools import FullName

Kind = Literal["reasoning", "message", "function_call"]
QUEUED, IN_PROGRESS = "queued", "in_progress"
COMPLETED, INCOMPLETE, FAILED, CANCELLED = "completed", "incomplete", "failed", "cancelled"
PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
TEXT_KINDS: dict[Kind, str] = {
    "reasoning": "reasoning_text",
    "message": "output_text",
    "function_call": "function_call_arguments",
}


@dataclass
class OutputItem:
    """One item, as far as it has come: a text, or a call, whose text is its arguments."""

    kind: Kind
    id: str
    place: int  # in the output
    call_id: str = ""
    name: str = ""  # of the function
    namespace: str = ""  # of it, where it is in one
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def text_kind(self) -> str:
        return TEXT_KINDS[self.kind]

    def where(self) -> dict[str, Any]:
        """Where an event's text belongs."""
        where: dict[str, Any] = {"item_id": self.id, "output_index": self.place}
        return where if self.kind == "function_call" else {**where, "content_index": 0}

    def more(self) -> dict[str, Any]:
        """What events and parts of a message have besides their text."""
        return {"logprobs": []} if self.kind == "message" else {}

    def part(self, text: str) -> dict[str, Any]:
        annotations: dict[str, Any] = {"annotations": []} if self.kind == "message" else {}
        return {"type": self.text_kind, "text": text, **annotations, **self.more()}

    def body(self, status: str) -> dict[str, Any]:
        """The item as the output lists it; without content while it is in progress."""
        head = {"id": self.id, "type": self.kind, "status": status}
        begun = status == IN_PROGRESS
        match self.kind:
            case "function_call":
                name = {"name": self.name, **({"namespace": self.namespace} if self.namespace else {})}
                return {**head, "call_id": self.call_id, **name, "arguments": "" if begun else self.text}
            case "message":
                return {**head, "role": "assistant", "content": [] if begun else [self.part(self.text)]}
            case "reasoning":
                return {**head, "summary": [], "content": [] if begun else [self.part(self.text)]}


class OutputItems:
    """The items so far."""

    def __init__(self, call_id: str, full_names: Mapping[str, FullName]) -> None:
        """`full_names`: of functions of namespaces, by the names that the model sees."""
        self._call_id = call_id
        self._full_names = full_names
        self.items: list[OutputItem] = []

    def take(self, delta: Delta) -> None:
        """What is new of the turn. It opens an item where it does not go on with the last one."""
        if delta.reasoning_content:
            self._text("reasoning", delta.reasoning_content)
        if delta.content:
            self._text("message", delta.content)
        for piece in delta.tool_calls or ():
            self._call(piece)

    def end(self) -> None:
        """An answer without text is an empty message."""
        if not self.items:
            self._open("message")

    def bodies(self, status: str) -> list[dict[str, Any]]:
        """The items of a response that ends with this status: its last item was cut off unless it is completed."""
        last = len(self.items) - 1
        return [item.body(last_status(status) if item.place == last else COMPLETED) for item in self.items]

    def _text(self, kind: Kind, text: str) -> None:
        if not self.items or self.items[-1].kind != kind:
            self._open(kind)
        self.items[-1].pieces.append(text)

    def _call(self, piece: ToolCall) -> None:
        """A call, or more of the arguments of the last one."""
        if isinstance(piece.id, str):
            self._open("function_call", piece.id, str(piece.function.name))
        if piece.function.arguments:
            self.items[-1].pieces.append(piece.function.arguments)

    def _open(self, kind: Kind, call_id: str = "", name: str = "") -> None:
        place = len(self.items)
        item_id = f"{PREFIXES[kind]}_{self._call_id}" + (f"_{place}" if place else "")
        full = self._full_names.get(name, FullName("", name))
        self.items.append(OutputItem(kind, item_id, place, call_id, full.name, full.namespace))


def last_status(status: str) -> str:
    """The status of the last item of a response; an item has not failed, it is incomplete."""
    return COMPLETED if status == COMPLETED else INCOMPLETE


class NumberedEvents:
    """Makes events, each with its number in the stream."""

    def __init__(self) -> None:
        self._next = 0

    def event(self, kind: str, **fields: Any) -> Event:
        """The next event."""
        data = msgspec.json.encode({"type": kind, "sequence_number": self._next, **fields})
        self._next += 1
        return Event(data, kind.encode())


class ItemEvents:
    """The events of an output's items: each is opened, grows, and is closed before the next one opens."""

    def __init__(self, numbered: NumberedEvents, output: OutputItems) -> None:
        self._numbered = numbered
        self._output = output
        self._open: OutputItem | None = None
        self._pieces = 0  # of the open item, that were sent

    def new_events(self) -> Iterator[Event]:
        """What is new since the last time."""
        for item in self._output.items[self._open.place if self._open else 0 :]:
            if item is not self._open:
                yield from self.close(COMPLETED)
                yield from self._opening(item)
            if text := "".join(item.pieces[self._pieces :]):
                self._pieces = len(item.pieces)
                kind = f"response.{item.text_kind}.delta"
                yield self._numbered.event(kind, **item.where(), delta=text, **item.more())

    def _opening(self, item: OutputItem) -> Iterator[Event]:
        self._open, self._pieces = item, 0
        opened = item.body(IN_PROGRESS)
        yield self._numbered.event("response.output_item.added", output_index=item.place, item=opened)
        if item.kind != "function_call":
            yield self._numbered.event("response.content_part.added", **item.where(), part=item.part(""))

    def close(self, status: str) -> Iterator[Event]:
        """The events that end the open item, with its last status."""
        item = self._open
        if item is None:
            return
        event = self._numbered.event
        if item.kind == "function_call":
            name = {"name": item.name}
            yield event(f"response.{item.text_kind}.done", **item.where(), **name, arguments=item.text)
        else:
            yield event(f"response.{item.text_kind}.done", **item.where(), text=item.text, **item.more())
            yield event("response.content_part.done", **item.where(), part=item.part(item.text))
        yield event("response.output_item.done", output_index=item.place, item=item.body(status))
