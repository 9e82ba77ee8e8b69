"""What clients of Anthropic's API send and get. Fields that are not here are ignored; null means the default."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from quartet.http_gateway.generation import other_names
from quartet.runtime.names import Name

Count = Annotated[int, msgspec.Meta(ge=0)]
Role = Literal["system", "user", "assistant"]


# Content blocks, a union tagged by `type`. Images, documents and search results are decoded in order to be refused.


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    """Reasoning of the model. Signatures are not verified."""

    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(msgspec.Struct, tag_field="type", tag="redacted_thinking"):
    """Reasoning that another service has encrypted."""

    data: str | None = None


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A tool call."""

    id: str
    name: str
    input: dict[str, Any]


class ImageBlock(msgspec.Struct, tag_field="type", tag="image"):
    """Refused."""


class DocumentBlock(msgspec.Struct, tag_field="type", tag="document"):
    """Refused."""


class SearchResultBlock(msgspec.Struct, tag_field="type", tag="search_result"):
    """Refused."""


class ToolResultBlock(msgspec.Struct, tag_field="type", tag="tool_result"):
    """The result of a tool call."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock | SearchResultBlock] | None = None
    is_error: bool | None = None


MessageBlock = (
    TextBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
)


class MessageParam(msgspec.Struct):
    role: Role
    content: str | list[MessageBlock]


class ToolParam(msgspec.Struct):
    """A tool. Server tools, which have a `type` of their own (web search, code execution), are refused."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None  # of the tool
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None  # summarized: the whole text


class OutputFormat(msgspec.Struct):
    schema_: dict[str, Any] = msgspec.field(name="schema")
    type: Literal["json_schema"] = "json_schema"


class OutputConfig(msgspec.Struct):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ConversationBody(msgspec.Struct, kw_only=True):
    """The fields that make the prompt: the body of POST /v1/messages/count_tokens."""

    messages: list[MessageParam]
    model: Name | None = None
    system: str | list[TextBlock] | None = None
    tools: list[ToolParam] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # what output_config.format was before
    cache_control: Any = None  # ignored, here and in blocks: every prefix is cached
    mcp_servers: list[Any] | None = None  # refused
    thread: Any = None  # refused


class MessagesBody(ConversationBody, kw_only=True):
    """POST /v1/messages."""

    OF_OTHER_APIS: ClassVar = other_names.MESSAGES

    max_tokens: Count
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None  # ignored


# Answers.


class ThinkingTokens(msgspec.Struct):
    thinking_tokens: int


class MessageUsage(msgspec.Struct, kw_only=True):
    """The prompt has input_tokens + cache_read_input_tokens tokens."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class Message(msgspec.Struct, kw_only=True):
    """The model's turn."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: Name
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    input_tokens: int


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["model"] = "model"
    display_name: str
    created_at: str  # RFC 3339
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int
    max_tokens: int


class ModelPage(msgspec.Struct, kw_only=True):
    data: list[ModelCard]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class ErrorCode(msgspec.Struct):
    """What clients act upon, where the message is for people."""

    error_code: str
    unsupported: list[str]  # fields of the request


class ErrorDetail(msgspec.Struct, omit_defaults=True):
    type: str
    message: str
    details: ErrorCode | None = None


class ErrorAnswer(msgspec.Struct, kw_only=True):
    type: Literal["error"] = "error"
    error: ErrorDetail
    request_id: str
