"""What clients of the OpenAI endpoints send. Unknown fields are ignored and `null` means the default.

Routers in front of servers rewrite bodies and spell out fields with their defaults; so every field may be null, and
what this server does not do is refused only when it is asked for.
"""

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from quartet.http_gateway.generation import other_names
from quartet.http_gateway.generation.truncation import Truncating
from quartet.http_gateway.openai.response_format import ResponseFormat, StructuredOutputs
from quartet.http_gateway.parsers.tool_events import Tool
from quartet.runtime.names import Name

Count = Annotated[int, msgspec.Meta(ge=0)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None  # one more chunk at the end, with the usage of all
    continuous_usage_stats: bool | None = None  # the usage so far in every chunk


class GenerationBody(Truncating, kw_only=True):
    """The fields that completions and chat completions share."""

    OF_OTHER_APIS: ClassVar = other_names.OPENAI

    model: Name | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Name | None = None
    # beyond OpenAI
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int | None] | None = None
    stop_regex: str | list[str] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    # vLLM's names for the same
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking_budget: int | None = None  # tokens of the thought
    max_thinking_tokens: int | None = None  # another name for it
    custom_params: dict[str, Any] | None = None
    rid: str | list[str] | None = None
    priority: int | None = None
    lora_path: str | list[str | None] | None = None  # the name of an adapter, or one for each prompt; see also `model`
    extra_key: str | None = None
    cache_salt: str | None = None
    log_metrics: bool | None = None
    background: bool | None = None
    data_parallel_rank: int | None = None  # the scheduler that computes it, where there are several
    routed_dp_rank: int | None = None  # another name for it
    # extra fields of each choice
    return_token_ids: bool | None = None  # ids of the output, with completions of the prompt too
    return_prompt_token_ids: bool | None = None
    return_hidden_states: bool | Literal["last"] | None = None  # behind the last token
    return_meta_info: bool | None = None  # the native one
    return_entropy: bool | None = None  # reported in meta_info, as is the mask
    return_sampling_mask: bool | None = None
    # refused
    session_params: Any = None
    custom_logit_processor: Any = None
    return_routed_experts: Any = None
    return_bytes: Any = None
    guided_whitespace_pattern: Any = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None


NAMES = [field.name for field in msgspec.structs.fields(GenerationBody)]
REFUSED = NAMES[NAMES.index("session_params") :]


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    OF_OTHER_APIS: ClassVar = other_names.COMPLETIONS

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None  # the prompt stands before the output, in text and logprobs
    logprobs: int | bool | None = None  # so many of the best tokens at each position
    suffix: str | None = None
    best_of: int | None = None  # accepted and ignored, as clients of this API expect


class NamedFunction(msgspec.Struct):
    name: str


class AllowedTool(msgspec.Struct):
    function: NamedFunction
    type: Literal["function"] = "function"


class AllowedTools(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: list[AllowedTool]


class NamedTool(msgspec.Struct):
    """The one tool that must be called, or those that may be."""

    function: NamedFunction | None = None
    type: Literal["function", "allowed_tools"] = "function"
    allowed_tools: AllowedTools | None = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    OF_OTHER_APIS: ClassVar = other_names.CHAT

    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None  # wins over max_tokens
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: bool | None = None  # the template's switch
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None  # refused: a template is code
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    input_ids: list[int] | None = None  # instead of the messages, which are then not rendered
