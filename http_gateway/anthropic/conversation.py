"""A request of Anthropic's API as the chat completion that it is."""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import msgspec

from quartet.http_gateway.anthropic.types import (
    ConversationBody,
    MessageBlock,
    MessagesBody,
    OutputConfig,
    OutputFormat,
    RedactedThinkingBlock,
    Role,
    TextBlock,
    Thinking,
    ThinkingBlock,
    ToolChoice,
    ToolParam,
    ToolResultBlock,
    ToolUseBlock,
)
from quartet.http_gateway.openai.response_format import JsonSchema, ResponseFormat
from quartet.http_gateway.openai.types import ChatBody, NamedFunction, NamedTool
from quartet.http_gateway.parsers.tool_events import Function, Tool
from quartet.runtime.errors import RequestError
from quartet.runtime.shorten import short

ALLOWED: dict[Role, tuple[type, ...]] = {
    "system": (TextBlock,),
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
}
NOT_TEXT = ("image", "document", "search_result")
CUSTOM = (None, "custom")  # types of the client's own tools
# The first line of Claude Code's system prompts. It contains a hash that changes with every request: with it, no prefix
# of the prompt would be found in the cache.
BILLING = "x-anthropic-billing-header:"
ERROR_PREFIX = "Error: "  # of a tool result with is_error: chat templates have no field for it
# The error by which this API's clients learn that they have to send the whole conversation.
NO_THREADS = "thread_unsupported_request"
PART_CHARS = 1 << 18  # of a text that are encoded at once: about a millisecond
MOST_OPENED = 64  # members of a list or an object that is encoded member by member

ChatMessage = dict[str, Any]


def chat_body(body: MessagesBody, thinks: bool = True) -> ChatBody:
    """The chat completion that a body of /v1/messages asks for. Raises RequestError.

    `thinks`: the server knows how its model marks thoughts. For other models a budget of thought limits nothing.
    """
    budget = checked_budget(body)
    return msgspec.structs.replace(
        conversation(body),
        rid=f"msg_{uuid.uuid4().hex}",  # the message's id: /abort_request takes it
        max_tokens=body.max_tokens,
        stop=body.stop_sequences or None,
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k or None,  # 0 is no limit there
        thinking_budget=budget if thinks else None,
    )


def conversation(body: ConversationBody) -> ChatBody:
    """The same without the sampling parameters: what makes the prompt."""
    if body.mcp_servers:
        raise RequestError("mcp_servers is not supported: this server runs no tools.", field="mcp_servers")
    if body.thread is not None:
        raise RequestError(
            "thread is not supported: the server keeps no conversations of this API; send all messages without it.",
            field="thread",
            code=NO_THREADS,
        )
    check_end(body)
    choice = body.tool_choice
    output = body.output_config or OutputConfig()
    form = format_of(body)
    return ChatBody(
        model=body.model,
        messages=messages_of(body),
        continue_final_message=bool(body.messages) and body.messages[-1].role == "assistant",
        tools=[tool_of(index, tool) for index, tool in enumerate(body.tools or ())] or None,
        tool_choice=None if choice is None else choice_of(choice),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        chat_template_kwargs=None if body.thinking is None else thinking_switch(body.thinking),
        reasoning_effort=output.effort,
        response_format=ResponseFormat("json_schema", JsonSchema(form.schema_)) if form else None,
    )


def format_of(body: ConversationBody) -> OutputFormat | None:
    """What text must look like, under either of the names. Raises RequestError where they disagree."""
    first, second = (body.output_config or OutputConfig()).format, body.output_format
    if first is not None and second is not None and first != second:
        raise RequestError(
            "output_format and output_config.format are two names for one format.", field="output_format"
        )
    return second if first is None else first


def check_end(body: ConversationBody) -> None:
    """Raise RequestError for a final turn of the model that cannot be continued."""
    last = body.messages[-1] if body.messages else None
    if last is None or last.role != "assistant" or isinstance(last.content, str):
        return
    if any(isinstance(block, ToolUseBlock) for block in last.content):
        raise RequestError(
            f"messages.{len(body.messages) - 1}: a final message of role 'assistant' is continued, and one with "
            "tool_use blocks cannot be: their tool_result blocks must come behind it, in a message of role 'user'.",
            field="messages",
        )


def messages_of(body: ConversationBody) -> list[ChatMessage]:
    """The messages of the chat completion. Consecutive messages of one role are merged: many templates require it."""
    found: list[ChatMessage] = []
    for role, parts in groupby(turns(body), itemgetter(0)):
        blocks = [block for _, part in parts for block in part]
        match role:
            case "assistant":
                found.append(assistant_message(blocks))
            case "user":
                found += user_messages(blocks)
            case "system" if text := system_text(blocks):
                found.append({"role": "system", "content": text})
    return found


def turns(body: ConversationBody) -> Iterator[tuple[Role, list[MessageBlock]]]:
    """The role and the blocks of the system prompt and of every message."""
    if body.system:
        yield "system", blocks_of("system", body.system, "system")
    for index, message in enumerate(body.messages):
        yield message.role, blocks_of(message.role, message.content, f"messages.{index}.content")


def blocks_of(role: Role, content: str | Sequence[MessageBlock], where: str) -> list[MessageBlock]:
    """The blocks of a message's content, whose path is `where`. Raises RequestError for a block that is not allowed."""
    if isinstance(content, str):
        return [TextBlock(content)]
    for index, block in enumerate(content):
        if not isinstance(block, ALLOWED[role]):
            raise refused(kind_of(block), role, f"{where}.{index}")
    return list(content)


def refused(kind: str, role: str, where: str) -> RequestError:
    why = "are not supported, only text is" if kind in NOT_TEXT else f"are not allowed in a message of role {role!r}"
    return RequestError(f"{where}: blocks of type {kind!r} {why}.", field="messages")


def kind_of(block: msgspec.Struct) -> str:
    return str(block.__struct_config__.tag)


def joined(blocks: Iterable[MessageBlock]) -> str:
    """The text blocks, joined by line breaks."""
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def system_text(blocks: Iterable[MessageBlock]) -> str:
    """The same without the billing line."""
    texts = (block.text for block in blocks if isinstance(block, TextBlock))
    kept = (text.partition("\n")[2] if text.startswith(BILLING) else text for text in texts)
    return "\n".join(filter(None, kept))


def user_messages(blocks: Iterable[MessageBlock]) -> Iterator[ChatMessage]:
    """Tool results and text, in their order."""
    for of_tools, run in groupby(blocks, lambda block: isinstance(block, ToolResultBlock)):
        if of_tools:
            yield from (tool_message(block) for block in run if isinstance(block, ToolResultBlock))
        else:
            yield {"role": "user", "content": joined(run)}


def tool_message(block: ToolResultBlock) -> ChatMessage:
    """The result of one call. Raises RequestError for content other than text."""
    content = block.content or ""
    if not isinstance(content, str):
        for part in content:
            if not isinstance(part, TextBlock):
                raise refused(kind_of(part), "user", f"tool_result {short(block.tool_use_id)!r}")
        content = joined(part for part in content if isinstance(part, TextBlock))
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": ERROR_PREFIX + content if block.is_error else content,
    }


def assistant_message(blocks: Sequence[MessageBlock]) -> ChatMessage:
    """A turn of the model. Redacted thinking is dropped: it is encrypted."""
    calls = [call_of(block) for block in blocks if isinstance(block, ToolUseBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking]
    text = joined(blocks)
    message: ChatMessage = {"role": "assistant", "content": text or None if calls else text}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def call_of(block: ToolUseBlock) -> dict[str, Any]:
    arguments = b"".join(encoded_in_parts(block.input)).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def encoded_in_parts(value: Any) -> Iterator[bytes]:
    """The JSON of a value. Other threads get their turn between the parts, however long a text in the value is."""
    match value:
        case str() if len(value) > PART_CHARS:
            yield b'"'
            for start in range(0, len(value), PART_CHARS):
                yield msgspec.json.encode(value[start : start + PART_CHARS])[1:-1]
            yield b'"'
        case dict() if len(value) <= MOST_OPENED:
            yield b"{"
            for index, (key, member) in enumerate(value.items()):
                yield b"," if index else b""
                yield from encoded_in_parts(key)
                yield b":"
                yield from encoded_in_parts(member)
            yield b"}"
        case list() if len(value) <= MOST_OPENED:
            yield b"["
            for index, member in enumerate(value):
                yield b"," if index else b""
                yield from encoded_in_parts(member)
            yield b"]"
        case _:
            yield msgspec.json.encode(value)


def tool_of(index: int, tool: ToolParam) -> Tool:
    """A tool of the client as a function. Raises RequestError for a server tool."""
    if tool.type not in CUSTOM:
        raise RequestError(
            f"tools.{index}: tools of type {short(tool.type)!r} are not supported: the server runs no tools.",
            field="tools",
        )
    if tool.input_schema is None:
        raise RequestError(f"tools.{index}: input_schema is required.", field="tools")
    return Tool(Function(tool.name, tool.description, tool.input_schema, tool.strict))


def choice_of(choice: ToolChoice) -> Any:
    """The value of `tool_choice` in a chat completion."""
    if choice.type != "tool":
        return {"any": "required"}.get(choice.type, choice.type)
    if choice.name is None:
        raise RequestError("tool_choice: name is required where type is 'tool'.", field="tool_choice")
    return NamedTool(NamedFunction(choice.name))


def thinking_switch(thinking: Thinking) -> dict[str, Any]:
    """The template variables that turn thinking on or off; model families use one of two names."""
    thinks = thinking.type != "disabled"
    return {"enable_thinking": thinks, "thinking": thinks}


def checked_budget(body: MessagesBody) -> int | None:
    """The tokens that a thought may have. Raises RequestError unless 0 < budget_tokens < max_tokens."""
    thinking = body.thinking
    if thinking is None or thinking.type != "enabled":
        return None
    if thinking.budget_tokens is None:
        raise RequestError("thinking: budget_tokens is required where type is 'enabled'.", field="thinking")
    if not 0 < thinking.budget_tokens < body.max_tokens:
        raise RequestError(
            f"thinking: budget_tokens ({thinking.budget_tokens}) must be above 0 and below max_tokens "
            f"({body.max_tokens}).",
            field="thinking",
        )
    return thinking.budget_tokens
