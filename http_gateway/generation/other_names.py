"""Fields of one of our APIs in a body of another: what to write there instead.

Nobody would read them where they stand, and whoever sends them believes that they count. So they are refused, where
they ask for something. Fields of other makes of servers are ignored.
"""

from collections.abc import Mapping
from typing import Any

from quartet.runtime.sampling import SamplingParams

PARAMETERS = SamplingParams.__struct_fields__
DEFAULTS = {name: getattr(SamplingParams(), name) for name in PARAMETERS if name != "max_new_tokens"}
NOTHING: tuple[Any, ...] = ("", [], {}, {"type": "text"})
CHAT_ONLY = "conversations go to /v1/chat/completions"
CHAT_HAS_IT = "/v1/chat/completions has it, this endpoint has not"
GENERATE_HAS_IT = "/generate has it, this endpoint has not"


def use(name: str) -> str:
    return f"use `{name}`"


def parameter(name: str) -> str:
    return f"use `{name}` of `sampling_params`"


BESIDE_MODEL = {"sampling_params": "put its fields beside `model`, under the names of this API"}
NATIVE_ONLY = dict.fromkeys(
    ("logprob_start_len", "token_ids_logprob", "input_embeds", "stream_interval"), GENERATE_HAS_IT
)

NATIVE: Mapping[str, str] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), parameter("max_new_tokens")),
    **dict.fromkeys(("response_format", "guided_json", "structured_outputs"), parameter("json_schema")),
    **dict.fromkeys(("guided_regex", "guided_choice"), parameter("regex")),
    "guided_grammar": parameter("ebnf"),
    "min_tokens": parameter("min_new_tokens"),
    "seed": parameter("sampling_seed"),
    "logprobs": use("return_logprob"),
    "top_logprobs": use("top_logprobs_num"),
    **dict.fromkeys(("messages", "tools", "chat_template_kwargs", "reasoning_effort"), CHAT_ONLY),
}
OPENAI: Mapping[str, str] = {
    **BESIDE_MODEL,
    **NATIVE_ONLY,
    "max_new_tokens": use("max_tokens"),
    "max_output_tokens": use("max_tokens"),
    "min_new_tokens": use("min_tokens"),
    "sampling_seed": use("seed"),
    "return_logprob": use("logprobs"),
    "top_logprobs_num": use("top_logprobs"),
}
CHAT: Mapping[str, str] = {
    **OPENAI,
    "functions": use("tools"),  # as this API called them before
    "function_call": use("tool_choice"),
}
COMPLETIONS: Mapping[str, str] = {
    **OPENAI,
    "max_completion_tokens": use("max_tokens"),
    "top_logprobs_num": use("logprobs"),
    "top_logprobs": use("logprobs"),
    "input_ids": use("prompt"),
    "messages": CHAT_ONLY,
}
ELSEWHERE_ON_V1 = {  # sampling that /v1/responses and /v1/messages lack
    **dict.fromkeys(PARAMETERS, CHAT_HAS_IT),
    **dict.fromkeys(("seed", "sampling_seed", "min_tokens", "min_new_tokens"), CHAT_HAS_IT),
    **dict.fromkeys(("logit_bias", "logprobs", "return_logprob", "top_logprobs_num"), CHAT_HAS_IT),
    **NATIVE_ONLY,
    **BESIDE_MODEL,
}
RESPONSES: Mapping[str, str] = {
    **ELSEWHERE_ON_V1,
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_new_tokens"), use("max_output_tokens")),
    **dict.fromkeys(("response_format", "json_schema"), use("text.format")),
    "reasoning_effort": use("reasoning.effort"),
    "min_new_tokens": use("min_tokens"),
    "messages": use("input"),
}
MESSAGES: Mapping[str, str] = {
    **ELSEWHERE_ON_V1,
    **dict.fromkeys(("max_output_tokens", "max_completion_tokens", "max_new_tokens"), use("max_tokens")),
    **dict.fromkeys(("response_format", "json_schema"), use("output_config.format")),
    "reasoning_effort": use("output_config.effort"),
    "stop": use("stop_sequences"),
}


def asks(name: str, value: Any) -> bool:
    """Whether a value asks for something, rather than spelling out the default."""
    if value is None or value is False or value in NOTHING:
        return False
    if name == "function_call" and value in ("auto", "none"):  # of functions, which are told apart
        return False
    return bool(name not in DEFAULTS or value != DEFAULTS[name])
