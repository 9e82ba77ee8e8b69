"""What clients of /v1/responses send. Unknown fields are ignored and `null` means the default."""

from typing import Any, ClassVar, Literal

import msgspec

from quartet.http_gateway.generation import other_names
from quartet.http_gateway.openai.response_format import ResponseFormat
from quartet.http_gateway.openai.types import Count
from quartet.runtime.names import Name

ToolChoice = Literal["none", "auto", "required"] | dict[str, Any]


class TextFormat(ResponseFormat, omit_defaults=True):
    """The form of the output. Its name and description are for the client; `strict` is the only mode there is."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    format: TextFormat | None = None


class ReasoningOptions(msgspec.Struct):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # none is written: the thought itself is returned


class ResponsesBody(msgspec.Struct, kw_only=True):
    """POST /v1/responses."""

    OF_OTHER_APIS: ClassVar = other_names.RESPONSES

    input: str | list[dict[str, Any]]
    model: Name | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    thinking_budget: int | None = None  # tokens of the thought
    max_thinking_tokens: int | None = None  # another name for it
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None  # of hosted tools; there are none, so every limit is kept
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    user: Name | None = None
    store: bool | None = None  # for later requests; as long as nobody says no
    previous_response_id: str | None = None  # of a stored response, whose conversation goes on
    background: bool | None = None  # nobody waits for it: its client asks for it by its id
    # how clients that measure get outputs of one length
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    # refused
    conversation: Any = None
    prompt: Any = None
    top_logprobs: Any = None


REFUSED = {
    "conversation": "conversation is not supported: go on from a response with previous_response_id.",
    "prompt": "prompt is not supported: the server keeps no prompt templates; send instructions and input.",
    "top_logprobs": "top_logprobs is not supported: /v1/chat/completions has them.",
}
