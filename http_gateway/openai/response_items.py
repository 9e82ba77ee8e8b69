"""The items of a response, as /v1/responses has them: the thought, where there is one, and the message."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from quartet.http_gateway.http.sse import Event

Kind = Literal["reasoning", "message"]
IN_PROGRESS = "in_progress"
PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg"}
TEXT_KINDS: dict[Kind, str] = {"reasoning": "reasoning_text", "message": "output_text"}


@dataclass
class Item:
    """One item on its way."""

    kind: Kind
    id: str
    place: int  # in the output
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def text_kind(self) -> str:
        return TEXT_KINDS[self.kind]

    def where(self) -> dict[str, Any]:
        """Where an event's text belongs."""
        return {"item_id": self.id, "output_index": self.place, "content_index": 0}

    def more(self) -> dict[str, Any]:
        """What events and parts of a message have besides their text."""
        return {"logprobs": []} if self.kind == "message" else {}

    def part(self, text: str) -> dict[str, Any]:
        annotations: dict[str, Any] = {"annotations": []} if self.kind == "message" else {}
        return {"type": self.text_kind, "text": text, **annotations, **self.more()}

    def body(self, status: str) -> dict[str, Any]:
        """The item as the output lists it; without content while it is in progress."""
        own: dict[str, Any] = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        content = [] if status == IN_PROGRESS else [self.part(self.text)]
        return {"id": self.id, "type": self.kind, **own, "status": status, "content": content}


class OutputItems:
    """The items so far."""

    def __init__(self, call_id: str) -> None:
        self._call_id = call_id
        self.items: list[Item] = []

    def take(self, kind: Kind, text: str) -> None:
        """More text; it opens an item where the last one is of another kind."""
        if not self.items or self.items[-1].kind != kind:
            self.items.append(Item(kind, f"{PREFIXES[kind]}_{self._call_id}", len(self.items)))
        self.items[-1].pieces.append(text)

    def end(self) -> None:
        """An answer without text is an empty message."""
        if not self.items:
            self.take("message", "")


class Numbered:
    """Events with their place in the stream."""

    def __init__(self) -> None:
        self._next = 0

    def event(self, kind: str, **fields: Any) -> Event:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._next, **fields})
        self._next += 1
        return Event(data, kind.encode())


class ItemEvents:
    """The events of an output's items: each is opened, grows, and is closed before the next one opens."""

    def __init__(self, numbered: Numbered, output: OutputItems) -> None:
        self._numbered = numbered
        self._output = output
        self._open: Item | None = None
        self._pieces = 0  # of the open item, that were sent

    def new_events(self) -> Iterator[Event]:
        """What is new since the last time."""
        for item in self._output.items[self._open.place if self._open else 0 :]:
            if item is not self._open:
                yield from self.close("completed")
                yield from self._opening(item)
            if text := "".join(item.pieces[self._pieces :]):
                self._pieces = len(item.pieces)
                kind = f"response.{item.text_kind}.delta"
                yield self._numbered.event(kind, **item.where(), delta=text, **item.more())

    def _opening(self, item: Item) -> Iterator[Event]:
        self._open, self._pieces = item, 0
        opened = item.body(IN_PROGRESS)
        yield self._numbered.event("response.output_item.added", output_index=item.place, item=opened)
        yield self._numbered.event("response.content_part.added", **item.where(), part=item.part(""))

    def close(self, status: str) -> Iterator[Event]:
        """The events that end the open item, with its last status."""
        item = self._open
        if item is None:
            return
        event = self._numbered.event
        yield event(f"response.{item.text_kind}.done", **item.where(), text=item.text, **item.more())
        yield event("response.content_part.done", **item.where(), part=item.part(item.text))
        yield event("response.output_item.done", output_index=item.place, item=item.body(status))
