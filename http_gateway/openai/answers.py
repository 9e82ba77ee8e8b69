"""What the OpenAI endpoints answer. Keys that have nothing to say are printed as null."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from quartet.http_gateway.generation.output import MetaInfo


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class ReasoningTokens(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: CachedTokens | None = None
    reasoning_tokens: int = 0
    completion_tokens_details: ReasoningTokens | UnsetType = UNSET  # the same where OpenAI has it; left out without any


class Metadata(msgspec.Struct):
    weight_version: str


class ExtraFields(msgspec.Struct, kw_only=True):
    """Extra fields of a choice; left out where they were not asked for."""

    token_ids: list[int] | UnsetType = UNSET  # of the output; in a stream, the new ones
    prompt_token_ids: list[int] | UnsetType = UNSET
    hidden_states: list[float] | UnsetType = UNSET  # behind the last token
    meta_info: MetaInfo | UnsetType = UNSET


# completions


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    text_offset: list[int]  # characters of the choice's text, all its chunks joined, before the token
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float | None] | None]


class CompletionChoice(ExtraFields, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None


class Completion(msgspec.Struct, kw_only=True):
    """An answer of /v1/completions, or one chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metadata: Metadata | UnsetType = UNSET


# chat completions


class CalledFunction(msgspec.Struct):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct, kw_only=True):
    """A call, or a piece of one: later pieces have nothing but their index and more of the arguments."""

    id: str | UnsetType = UNSET
    index: int
    type: Literal["function"] | UnsetType = "function"
    function: CalledFunction


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Delta(msgspec.Struct, kw_only=True):
    """What is new in a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    hidden_states: list[float] | UnsetType = UNSET


class ScoredToken(msgspec.Struct, kw_only=True):
    token: str
    bytes: list[int]
    logprob: float | None


class ScoredPosition(msgspec.Struct, kw_only=True):
    token: str
    bytes: list[int]
    logprob: float | None
    top_logprobs: list[ScoredToken]


class ChatLogprobs(msgspec.Struct):
    content: list[ScoredPosition]


class ChatChoice(ExtraFields, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None


class ChatChunkChoice(ExtraFields, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metadata: Metadata


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Failure(msgspec.Struct, kw_only=True):
    """An error; the OpenAI endpoints repeat it under `error`, others have nothing but that."""

    object: Literal["error"] = "error"
    message: str = ""
    type: str = ""
    param: str | None = None
    code: int = 400
    error: Any = None
