"""A request of /v1/responses as the chat completion that it is: its items become messages, its tools functions."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quartet.http_gateway.native.generate_body import asks
from quartet.http_gateway.openai.response_tools import Offered, name_in
from quartet.http_gateway.openai.response_types import REFUSED, ReasoningOptions, ResponsesBody
from quartet.http_gateway.openai.types import ChatBody
from quartet.runtime.errors import RequestError
from quartet.runtime.shorten import short

Item = Mapping[str, Any]
ChatMessage = dict[str, Any]

PREFIX = "resp_"  # of the ids of responses
TEXT_PARTS = ("text", "input_text", "output_text")
NO_TEXT_PART = "{}: content parts must be text: {{type: input_text, text}}."
# Values of `include` that ask for nothing more than every answer has: no thought is encrypted, and no hosted tool runs.
INCLUDABLE = (
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)


def chat_body(body: ResponsesBody, tools: Offered, earlier: Sequence[dict[str, Any]] = ()) -> ChatBody:
    """The chat completion that a request asks for. `earlier`: items of the conversation so far. Raises RequestError."""
    for name, why in REFUSED.items():
        if asks(getattr(body, name)):
            blamed = "prompt.id" if name == "prompt" else name  # the ring calls the input so
            raise RequestError(why, field=blamed)
    check_include(body.include or ())
    if body.max_tool_calls is not None and body.max_tool_calls < 1:
        raise RequestError(f"max_tool_calls must be at least 1, got {body.max_tool_calls}.", field="max_tool_calls")
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return ChatBody(
        rid=f"{PREFIX}{uuid.uuid4().hex}",  # the response's id: /abort_request takes it
        messages=system + messages_of(items_of(body.input), earlier),
        model=body.model,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stream=body.stream,
        response_format=body.text.format if body.text else None,
        tools=tools.functions or None,
        tool_choice=tools.choice,
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=(body.reasoning or ReasoningOptions()).effort,
        thinking_budget=body.thinking_budget,
        max_thinking_tokens=body.max_thinking_tokens,
        truncate=True if body.truncation == "auto" else None,
    )


def check_include(values: list[str] | tuple[str, ...]) -> None:
    """Raise RequestError for a value of `include` that asks for something this server does not return."""
    for value in values:
        if value not in INCLUDABLE:
            raise RequestError(f"include: {short(value)!r} is not supported.", field="include")


def items_of(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input as a list of items: a text is one message of the user."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return given


@dataclass
class ModelTurn:
    """A turn of the model: its items so far. They are joined once, when the conversation is read."""

    contents: list[Any] = field(default_factory=list)  # of its messages
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def message(self) -> ChatMessage:
        """The turn as one message."""
        if all(isinstance(content, str) for content in self.contents):
            content: Any = "".join(self.contents) if self.contents or not self.calls else None
        else:
            content = [part for content in self.contents for part in parts_of(content)]
        message: ChatMessage = {"role": "assistant", "content": content}
        if self.thoughts:
            message["reasoning_content"] = "\n".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        return message


class Conversation:
    """Collects items as chat messages. A turn of the model is one message, whatever items it was."""

    def __init__(self) -> None:
        self._turns: list[ChatMessage | ModelTurn] = []
        self._called: set[str] = set()  # ids of the calls so far

    def messages(self) -> list[ChatMessage]:
        """The messages so far."""
        return [turn.message() if isinstance(turn, ModelTurn) else turn for turn in self._turns]

    def take(self, item: Item, where: str) -> None:
        """Add an item, whose path is `where`. Raises RequestError."""
        kind = item.get("type") or "message"
        if not isinstance(kind, str) or kind not in READERS:
            raise RequestError(
                f"{where}: items of type {short(str(kind))!r} are not supported: {', '.join(READERS)} and "
                "item_reference are.",
                field="input",
            )
        READERS[kind](self, item, where)

    def add_message(self, item: Item, where: str) -> None:
        """A message. The model's own belongs to its turn, behind a thought or beside calls."""
        content = content_of(item.get("content"), where)
        if item.get("role") != "assistant":
            self._turns.append({"role": item.get("role"), "content": content})
            return
        turn = self._last_turn()
        if turn is None or (turn.contents and not turn.calls):
            turn = self._new_turn()
        turn.contents.append("" if content is None else content)

    def add_thought(self, item: Item, where: str) -> None:
        """A thought begins a turn. One that is encrypted only is dropped."""
        if not (text := thought_text(item, where)):
            return
        turn = self._last_turn()
        if turn is None or turn.contents or turn.calls:
            turn = self._new_turn()
        turn.thoughts.append(text)

    def add_call(self, item: Item, where: str) -> None:
        """A call of a function: it belongs to the model's turn."""
        call_id, _, arguments = (text_field(item, key, where) for key in ("call_id", "name", "arguments"))
        self._called.add(call_id)
        turn = self._last_turn() or self._new_turn()
        turn.calls.append(
            {"id": call_id, "type": "function", "function": {"name": name_in(item), "arguments": arguments}}
        )

    def add_output(self, item: Item, where: str) -> None:
        """The output of a call that came before."""
        call_id = text_field(item, "call_id", where)
        if call_id not in self._called:
            raise RequestError(
                f"{where}: no function_call with call_id {short(call_id)!r} comes before its output.", field="input"
            )
        output = item.get("output")
        if not isinstance(output, str | list):
            raise RequestError(f"{where}: output must be a string or a list of text parts.", field="input")
        text = output if isinstance(output, str) else "\n".join(part_of(part, where)["text"] for part in output)
        self._turns.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _last_turn(self) -> ModelTurn | None:
        """The last message, where it is a turn of the model."""
        last = self._turns[-1] if self._turns else None
        return last if isinstance(last, ModelTurn) else None

    def _new_turn(self) -> ModelTurn:
        turn = ModelTurn()
        self._turns.append(turn)
        return turn


READERS: dict[str, Callable[[Conversation, Item, str], None]] = {
    "message": Conversation.add_message,
    "reasoning": Conversation.add_thought,
    "function_call": Conversation.add_call,
    "function_call_output": Conversation.add_output,
}


def messages_of(items: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]] = ()) -> list[ChatMessage]:
    """The messages of a chat completion. Raises RequestError for an item that is not supported."""
    conversation = Conversation()
    for item in earlier:
        conversation.take(item, "previous_response_id")
    for index, item in enumerate(items):
        conversation.take(item, f"input[{index}]")
    return conversation.messages()


def content_of(content: Any, where: str) -> Any:
    """The content of a message; what is neither a text nor a list is refused by the chat completion."""
    return [part_of(part, where) for part in content] if isinstance(content, list) else content


def part_of(part: Any, where: str) -> dict[str, Any]:
    """A part of a message as chat completions have it."""
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise RequestError(NO_TEXT_PART.format(where), field="input")


def parts_of(content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def thought_text(item: Item, where: str) -> str:
    """The thought of a reasoning item, or its summary where it has nothing else."""
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
        ):
            raise RequestError(f"{where}: {name} must be a list of parts with a text.", field="input")
        if parts:
            return "\n".join(part["text"] for part in parts)
    return ""


def text_field(item: Item, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}: {name} must be a string in an item of type {item['type']!r}.", field="input")
    return value
