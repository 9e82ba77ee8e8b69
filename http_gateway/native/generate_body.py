"""The body of POST /generate: its fields, its shapes (one prompt, many, copies), and the Job it asks for.

Unknown keys are ignored, `null` is the default. Fields of type Any are refused if they ask for something, but `rid`.
"""

from array import array
from functools import cache
from typing import Any, ClassVar, TypeVar

import msgspec

from quartet.http_gateway.generation import other_names
from quartet.http_gateway.generation.intake import NO_BUDGET, Job, Rules, fan_out, sampling_params
from quartet.http_gateway.generation.rank_choice import chosen_rank
from quartet.http_gateway.generation.resumed import read_resumed
from quartet.http_gateway.generation.truncation import Truncating, read_truncation
from quartet.runtime import limits
from quartet.runtime.errors import EMPTY_IDS, RequestError, not_whole_rows
from quartet.runtime.messages import Generate, LogprobOptions, Request, Thought, pack_ids
from quartet.runtime.sampling import SamplingParams

T = TypeVar("T")

ONE_PROMPT = "Either text, input_ids or input_embeds should be provided."
ROUTED_EXPERTS_OFF = (
    "The server is not configured to return routed experts. "
    "Please set `--enable-return-routed-experts` to enable this feature."
)
HIDDEN_STATES_OFF = (
    "The server is not configured to return the hidden states. "
    "Please set `--enable-return-hidden-states` to enable this feature."
)
TWO_BUDGETS = "thinking_budget and max_thinking_tokens are two names for one limit."
NO_THOUGHT = (
    "require_reasoning before a constrained output needs a json_schema, and a server started with --reasoning-parser."
)
RIDS_MISMATCH = "The specified rids length mismatch with the batch_size for batch processing."


class GenerateBody(Truncating, kw_only=True):
    # No client of this API sends these at the top; whoever does would get the defaults instead.
    ELSEWHERE: ClassVar = dict.fromkeys(SamplingParams.__struct_fields__, "sampling_params")
    OF_OTHER_APIS: ClassVar = other_names.NATIVE

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    input_embeds: list[list[float | list[float]]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any] | None] | None = None
    rid: Any = None
    stream: bool | None = None
    background: bool | None = None
    log_metrics: bool | None = None
    extra_key: str | list[str] | None = None
    cache_salt: str | list[str] | None = None
    priority: int | list[int] | None = None
    lora_path: str | list[str | None] | None = None  # the name of an adapter
    # logprobs
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[int | list[int] | None] | None = None
    return_text_in_logprobs: bool | None = None
    return_hidden_states: bool | list[bool] | None = None
    return_routed_experts: bool | list[bool] | None = None
    routed_experts_start_len: int | list[int] | None = None
    return_prompt_token_ids: bool | None = None
    return_entropy: bool | list[bool] | None = None
    return_sampling_mask: bool | list[bool] | None = None
    require_reasoning: bool | list[bool] | None = None
    max_thinking_tokens: int | None = None  # of every prompt whose parameters have no thinking_budget
    resume_ids: list[int] | None = None  # output that the client has: the answer is what follows it
    # the scheduler that computes it, where there are several
    data_parallel_rank: int | None = None
    routed_dp_rank: int | None = None
    # refused
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    modalities: Any = None
    custom_logit_processor: Any = None
    session_params: Any = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    return_indexer_topk: Any = None
    sampling_logprobs_mode: Any = None
    return_flat_raw_top_logprobs: Any = None
    return_flat_raw_top_logprobs_b64: Any = None
    watermark: Any = None
    custom_labels: Any = None


FIELDS = [field.name for field in msgspec.structs.fields(GenerateBody)]
REFUSED = FIELDS[FIELDS.index("image_data") :]
REFUSED_PER_COPY = (
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_entropy",
    "return_sampling_mask",
)


def to_job(body: GenerateBody, rules: Rules) -> tuple[Job, bool]:
    """The Job, and whether one object (not a list) answers it. Raises RequestError in the contract's words."""
    refuse_unsupported_fields(body)
    prompts = read_prompts(body, rules)
    single = is_single(body)
    size = len(prompts)
    params = params_per_prompt(body, size, rules)
    logprobs = read_logprobs(body, params)
    thoughts = read_thoughts(body, params, rules)
    keys, salts = per_prompt(body, "extra_key", "", size), per_prompt(body, "cache_salt", "", size)
    adapters = per_prompt(body, "lora_path", "", size)
    priorities = read_priorities(body, size, rules)
    experts, starts = read_routed_experts(body, size, rules)
    hidden = read_hidden_states(body, size, rules)
    truncation = read_truncation(body, "left")
    rank = chosen_rank(body, rules.schedulers)
    resumed = read_resumed(body.resume_ids, params[0], single, rules)
    for i, prompt in enumerate(prompts):
        prompt.request = Request(
            rid="",
            params=params[i],
            logprobs=logprobs[i],
            stream=bool(body.stream),
            adapter=adapters[i],
            extra_key=keys[i] + salts[i],
            wanted_rank=rank,
            resume_ids=resumed,
            priority=priorities[i],
            thought=thoughts[i],
            return_hidden_states=hidden[i],
            return_prompt_ids=bool(body.return_prompt_token_ids),
            return_routed_experts=experts[i],
            routed_experts_start_len=starts[i],
            log_metrics=body.log_metrics is not False,
        )
        if truncation is not None:
            truncation.apply(prompt.request, rules)
    job = fan_out(prompts, rids_per_prompt(body.rid, size, single), rules)
    if isinstance(body.rid, str):
        job.parents = [body.rid] * len(job.requests)
    job.background = bool(body.background)
    return job, single and params[0].n == 1


def is_single(body: GenerateBody) -> bool:
    """One prompt, rather than a list of them (even of one)."""
    if body.text is not None:
        return isinstance(body.text, str)
    if body.input_ids is not None:
        return not body.input_ids or isinstance(body.input_ids[0], int)
    rows = body.input_embeds or [[]]
    return not rows[0] or not isinstance(rows[0][0], list)


def asks(value: Any) -> bool:
    """Whether a value asks for something, rather than spelling out the default."""
    return bool(value) and not (isinstance(value, list) and not any(map(asks, value)))


def refuse_unsupported_fields(body: GenerateBody) -> None:
    for name in REFUSED:
        if asks(getattr(body, name)):
            raise RequestError(f"{name} is not supported.", field=name)


def per_prompt(body: GenerateBody, name: str, default: T, size: int) -> list[T]:
    """The field's value for each prompt: a scalar is the same for all, a list must have one for each."""
    value = getattr(body, name)
    if not isinstance(value, list):
        return [default if value is None else value] * size
    if is_single(body):
        raise RequestError(f"{name} should not be a list for a single prompt.", field=name)
    if len(value) != size:
        raise RequestError(f"{name} has {len(value)} items for a batch of {size}.", field=name)
    return [default if item is None else item for item in value]


# prompts


def read_prompts(body: GenerateBody, rules: Rules) -> list[Generate]:
    """One Generate per prompt, without its request."""
    given = [name for name in ("text", "input_ids", "input_embeds") if getattr(body, name) is not None]
    if len(given) != 1:
        raise RequestError(ONE_PROMPT, field=given[0] if given else "text")
    name = given[0]
    check_batch(1 if is_single(body) else len(getattr(body, name)), name)
    prompts = READERS[name](body, rules)
    if not prompts:
        raise RequestError(f"{name} cannot be empty.", field=name)
    return prompts


def check_batch(size: int, field: str) -> None:
    """Before anything is made of the prompts."""
    if size > limits.MAX_BATCH_PROMPTS:
        raise RequestError(f"A batch may have at most {limits.MAX_BATCH_PROMPTS} prompts, got {size}.", field=field)


def placeholder_request() -> Request:
    """The request of a prompt until it gets its own."""
    return Request(rid="", params=SamplingParams())


def read_text(body: GenerateBody, rules: Rules) -> list[Generate]:
    texts = [body.text] if isinstance(body.text, str) else body.text or []
    return [Generate(request=placeholder_request(), text=text) for text in texts]


def read_ids(body: GenerateBody, rules: Rules) -> list[Generate]:
    given = body.input_ids or []
    if not given:
        raise RequestError(EMPTY_IDS, field="input_ids")
    prompts: list[Any] = [given] if is_single(body) else given
    return [
        Generate(request=placeholder_request(), input_ids=pack_prompt_ids(ids, rules.vocab_size)) for ids in prompts
    ]


def pack_prompt_ids(ids: Any, vocab_size: int) -> bytes:
    """A prompt's ids as int32 bytes. Raises RequestError for what is no list of ids; the range is checked later."""
    if ids == []:
        raise RequestError(EMPTY_IDS, field="input_ids")
    try:
        return pack_ids(ids)
    except TypeError:
        raise RequestError("input_ids should be a list of lists for batch processing.", field="input_ids") from None
    except OverflowError:
        raise RequestError(
            f"The input_ids contains values greater than the vocab size ({vocab_size}).", field="input_ids"
        ) from None


def read_embeds(body: GenerateBody, rules: Rules) -> list[Generate]:
    """One Generate per prompt of float rows. Raises RequestError while the prefix cache is on."""
    if rules.prefix_cache:
        raise RequestError(
            "input_embeds is provided while the radix cache is on; start the server with --disable-radix-cache.",
            field="input_embeds",
        )
    given: Any = body.input_embeds
    prompts = [given] if is_single(body) else given
    return [Generate(request=placeholder_request(), embeds=pack_rows(rows, rules.hidden_size)) for rows in prompts]


def pack_rows(rows: list[Any], hidden_size: int) -> bytes:
    """float32 (positions, hidden)"""
    if not rows or any(not isinstance(row, list) or len(row) != hidden_size for row in rows):
        raise not_whole_rows(hidden_size)
    try:
        return b"".join(array("f", row).tobytes() for row in rows)
    except (TypeError, OverflowError):
        raise RequestError("input_embeds must hold numbers within float32.", field="input_embeds") from None


READERS = {"text": read_text, "input_ids": read_ids, "input_embeds": read_embeds}


# everything else


def params_per_prompt(body: GenerateBody, size: int, rules: Rules) -> list[SamplingParams]:
    """The sampling parameters of each prompt. Raises RequestError; prompts without their own share one object."""
    given: list[dict[str, Any]] = per_prompt(body, "sampling_params", {}, size)
    if body.max_thinking_tokens is not None:
        given = [with_budget(item, body.max_thinking_tokens) for item in given]
    if isinstance(body.sampling_params, list):
        params = [sampling_params(item, rules) for item in given]
    else:
        params = [sampling_params(given[0], rules)] * size  # read and checked once
    if len({item.n for item in params}) > 1:
        raise RequestError("The parallel_sample_num should be the same for all samples in sample params.", field="n")
    if params[0].n > 1:
        refuse_lists_for_copies(body)
    return params


def with_budget(params: dict[str, Any], budget: int) -> dict[str, Any]:
    """The same parameters with a budget of thought. Raises RequestError where they have another one."""
    if params.get("thinking_budget") not in (None, budget):
        raise RequestError(TWO_BUDGETS, field="max_thinking_tokens")
    return {**params, "thinking_budget": budget}


def refuse_lists_for_copies(body: GenerateBody) -> None:
    lists = [name for name in REFUSED_PER_COPY if isinstance(getattr(body, name), list)]
    if any(isinstance(item, list) for item in body.token_ids_logprob or []):
        lists.append("token_ids_logprob")
    if lists:
        raise RequestError(f"{lists[0]} should not be a list when n is greater than 1.", field=lists[0])


def read_logprobs(body: GenerateBody, params: list[SamplingParams]) -> list[LogprobOptions | None]:
    """What each prompt asks for about the distributions that its tokens are drawn from."""
    size = len(params)
    requested = per_prompt(body, "return_logprob", False, size)
    entropies, supports = (
        per_prompt(body, "return_entropy", False, size),
        per_prompt(body, "return_sampling_mask", False, size),
    )
    starts = per_prompt(body, "logprob_start_len", -1, size)
    tops = per_prompt(body, "top_logprobs_num", 0, size)
    tokens = read_asked_tokens(body, size)
    text = bool(body.return_text_in_logprobs)

    @cache
    def options(start: int, top: int, index: int) -> LogprobOptions:
        return LogprobOptions(start=start, top=top, token_ids=tokens[index] or None, text=text)

    shared = size > 1 and tokens[0] is tokens[1]  # prompts that ask for the same share their options
    found = [
        options(start, top, 0 if shared else index) if asked else None
        for index, (asked, start, top) in enumerate(zip(requested, starts, tops, strict=True))
    ]
    return [with_distribution(*each_of) for each_of in zip(found, entropies, supports, params, strict=True)]


def with_distribution(
    options: LogprobOptions | None, entropy: bool, support: bool, params: SamplingParams
) -> LogprobOptions | None:
    """The same options, and these figures of the distribution. Raises RequestError for a support without a bound."""
    if not (entropy or support):
        return options
    if support and not (params.greedy or 1 <= params.top_k <= limits.MAX_SUPPORT_TOKENS):
        raise RequestError(
            f"return_sampling_mask needs a top_k in [1, {limits.MAX_SUPPORT_TOKENS}], or temperature 0: "
            "else the mask may be the whole vocabulary.",
            field="return_sampling_mask",
        )
    return msgspec.structs.replace(options or LogprobOptions(returned=False), entropy=entropy, support=support)


def read_thoughts(body: GenerateBody, params: list[SamplingParams], rules: Rules) -> list[Thought | None]:
    """How the output of each prompt may think, where that matters: before JSON if asked for, and under a budget."""
    requested = per_prompt(body, "require_reasoning", False, len(params))
    return [thought_of(asked, own, rules) for asked, own in zip(requested, params, strict=True)]


def thought_of(asked: bool, params: SamplingParams, rules: Rules) -> Thought | None:
    """The thought of one output, None for none. Raises RequestError where the model's marks are not known."""
    before_grammar = asked and params.grammar is not None
    if before_grammar and (rules.thought is None or params.json_schema is None):
        raise RequestError(NO_THOUGHT, field="require_reasoning")
    if params.thinking_budget is not None and rules.thought is None:
        raise RequestError(NO_BUDGET, field="thinking_budget")
    limited = params.thinking_budget is not None and params.regex is None and params.ebnf is None
    return rules.thought if before_grammar or limited else None


def read_asked_tokens(body: GenerateBody, size: int) -> list[list[int] | None]:
    """token_ids_logprob: a list of ids is the same for all prompts, a list of lists has one for each."""
    given: Any = body.token_ids_logprob
    if not given or all(isinstance(item, int) for item in given):
        return [given] * size
    if any(isinstance(item, int) for item in given):
        raise RequestError("token_ids_logprob should be a list of ids or a list of lists.", field="token_ids_logprob")
    return per_prompt(body, "token_ids_logprob", None, size)


def read_priorities(body: GenerateBody, size: int, rules: Rules) -> list[int]:
    if body.priority is not None and not rules.priorities:
        raise RequestError("priority needs a server started with --enable-priority-scheduling.", field="priority")
    return per_prompt(body, "priority", 0, size)


def read_routed_experts(body: GenerateBody, size: int, rules: Rules) -> tuple[list[bool], list[int]]:
    """Whether each prompt asks for the experts that its tokens chose, and from which position on."""
    requested = per_prompt(body, "return_routed_experts", False, size)
    starts = per_prompt(body, "routed_experts_start_len", 0, size)
    if any(requested) and not rules.routed_experts:
        raise RequestError(ROUTED_EXPERTS_OFF, field="return_routed_experts")
    if min(starts) < 0:
        raise RequestError(
            f"routed_experts_start_len must be at least 0, got {min(starts)}.", field="routed_experts_start_len"
        )
    return requested, starts


def read_hidden_states(body: GenerateBody, size: int, rules: Rules) -> list[bool]:
    requested = per_prompt(body, "return_hidden_states", False, size)
    if any(requested) and not rules.hidden_states:
        raise RequestError(HIDDEN_STATES_OFF, field="return_hidden_states")
    return requested


def rids_per_prompt(rid: Any, size: int, single: bool) -> list[str | None]:
    """The rid of each prompt: as given, numbered where one is given for many, None where the gateway draws it."""
    rids = rid if isinstance(rid, list) else [rid]
    if any(not isinstance(item, str | None) or item == "" for item in rids):
        raise RequestError("The rid should be a string or a list of strings.", field="rid")
    if any(item and len(item) > limits.MAX_RID_CHARS for item in rids):
        raise RequestError(f"A rid may have at most {limits.MAX_RID_CHARS} characters.", field="rid")
    if isinstance(rid, list):
        if single or len(rid) != size:
            raise RequestError(RIDS_MISMATCH, field="rid")
        return rids
    return [rid] * size if single or rid is None else [f"{rid}_{i}" for i in range(size)]
