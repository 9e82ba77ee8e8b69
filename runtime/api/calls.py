"""What the methods of `Engine` send: fields, paths and bodies, and what is taken from the answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypedDict

from quartet.runtime.limits import MAX_BATCH_PROMPTS
from quartet.runtime.sampling import SamplingParams


class GenerateFields(TypedDict, total=False):
    """What `generate` takes besides prompts and sampling parameters: the fields of POST /generate."""

    rid: str | list[str]
    lora_path: str | list[str | None]
    extra_key: str | list[str]
    cache_salt: str | list[str]
    priority: int | list[int]
    return_logprob: bool | list[bool]
    logprob_start_len: int | list[int]
    top_logprobs_num: int | list[int]
    token_ids_logprob: list[int] | list[list[int] | None]
    return_text_in_logprobs: bool
    return_hidden_states: bool | list[bool]
    return_routed_experts: bool | list[bool]
    routed_experts_start_len: int | list[int]
    return_prompt_token_ids: bool
    return_entropy: bool | list[bool]
    return_sampling_mask: bool | list[bool]
    require_reasoning: bool | list[bool]
    max_thinking_tokens: int
    truncate_prompt_tokens: int
    truncation_side: Literal["left", "right"]
    input_embeds: list[Any]
    resume_ids: list[int]


class ChatFields(TypedDict, total=False):
    """What `chat` takes besides messages: the fields of POST /v1/chat/completions."""

    lora_path: str
    max_tokens: int
    max_completion_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    n: int
    stop: str | list[str]
    stop_token_ids: list[int]
    stop_regex: str | list[str]
    no_stop_trim: bool
    ignore_eos: bool
    min_tokens: int
    seed: int
    logit_bias: dict[str, float]
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logprobs: bool
    top_logprobs: int
    response_format: dict[str, Any]
    json_schema: str | dict[str, Any]
    regex: str
    ebnf: str
    structural_tag: str | dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
    enable_thinking: bool
    separate_reasoning: bool
    stream_reasoning: bool
    stream_options: dict[str, bool]
    thinking_budget: int
    max_thinking_tokens: int
    documents: list[dict[str, Any]]
    chat_template_kwargs: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    custom_params: dict[str, Any]
    priority: int
    extra_key: str
    cache_salt: str
    rid: str
    user: str
    return_token_ids: bool
    return_prompt_token_ids: bool
    return_hidden_states: bool | Literal["last"]
    return_meta_info: bool
    return_entropy: bool
    return_sampling_mask: bool
    truncate_prompt_tokens: int
    truncation_side: Literal["left", "right"]


SAMPLING = {*SamplingParams.__struct_fields__, *ChatFields.__annotations__}


class Call(NamedTuple):
    """One request to the engine, and what its method gives of the answer."""

    path: str
    body: dict[str, Any] | None = None  # None: GET
    read: Callable[[Any], Any] = lambda answer: answer
    is_text: bool = False  # the answer is a line for people


def given(**fields: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def check_names(fields: Mapping[str, Any], known: type, method: str) -> None:
    """Raise TypeError for a keyword that the server would ignore."""
    names = known.__annotations__.keys()
    for name in fields.keys() - names:
        near = get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if known is GenerateFields and name in SAMPLING:
            hint = "; sampling parameters go into sampling_params"
        raise TypeError(f"{method}() got an unexpected keyword argument {name!r}{hint}")


def generate(
    prompt: str | Sequence[str] | None,
    sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    stream: bool,
    fields: Mapping[str, Any],
) -> Call:
    """POST /generate."""
    check_names(fields, GenerateFields, "generate")
    body = given(text=prompt, sampling_params=sampling_params, input_ids=input_ids, **fields)
    return Call("/generate", body | ({"stream": True} if stream else {}))


def chat(messages: Sequence[Mapping[str, Any]], stream: bool, fields: Mapping[str, Any]) -> Call:
    """POST /v1/chat/completions."""
    check_names(fields, ChatFields, "chat")
    return Call("/v1/chat/completions", {"messages": messages, **given(stream=stream or None, **fields)})


def encode(prompt: Any, input_ids: Any, dimensions: int | None) -> Call:
    """POST /encode."""
    return Call("/encode", given(text=prompt, input_ids=input_ids, dimensions=dimensions))


def embed(prompt: str | Sequence[str], dimensions: int | None) -> Call:
    """POST /encode; only the vectors count."""

    def vectors(answer: Any) -> Any:
        return [one["embedding"] for one in answer] if isinstance(answer, list) else answer["embedding"]

    return encode(prompt, None, dimensions)._replace(read=vectors)


def score(query: Any, items: Any, label_token_ids: Sequence[int], apply_softmax: bool, item_first: bool) -> Call:
    """POST /v1/score."""
    body = {"query": query, "items": items, "label_token_ids": label_token_ids}
    options = {"apply_softmax": apply_softmax, "item_first": item_first}
    return Call("/v1/score", body | options, lambda answer: answer["scores"])


def rerank(query: str, documents: Sequence[str], top_n: int | None, return_documents: bool) -> Call:
    """POST /v1/rerank."""
    fields = given(top_n=top_n, return_documents=return_documents)
    return Call("/v1/rerank", {"query": query, "documents": documents, **fields})


def parts(call: Call) -> Iterator[Call]:
    """A call with more prompts than a server takes at once, as several; what is given by prompt is cut likewise."""
    body = call.body or {}
    name = next((name for name in ("text", "input_ids") if is_batch(body.get(name))), None)
    count = len(body[name]) if name else 0
    if count <= MAX_BATCH_PROMPTS:
        yield call
        return
    cut = {name: value for name, value in body.items() if isinstance(value, list | tuple) and len(value) == count}
    for start in range(0, count, MAX_BATCH_PROMPTS):
        piece = {name: value[start : start + MAX_BATCH_PROMPTS] for name, value in cut.items()}
        yield call._replace(body=body | piece)


def is_batch(prompts: Any) -> bool:
    """Several prompts, as texts or as lists of ids, rather than one."""
    return isinstance(prompts, list | tuple) and bool(prompts) and not isinstance(prompts[0], int)
