"""From prompts to the requests that travel on the ring: checks, copies, rids, seeds. Shared by every API.

An endpoint makes one Generate per prompt (its rid still empty) and hands them to `fan_out`; `run_group` carries out
the Job that comes of it. An embedding is asked for in the same way, by `task`.
"""

import secrets
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import msgspec

from quartet.http_gateway.generation.adapters import Adapters
from quartet.http_gateway.ring.transport import OUT_OF_RANGE
from quartet.runtime import limits
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import CALL_BYTES_PER_BODY_BYTE
from quartet.runtime.messages import Generate, Request, Thought, unpack_ids
from quartet.runtime.sampling import SamplingParams, check_params, read_params
from quartet.runtime.vocabulary import check_input_ids, check_logprob_options

PARAMETERS = {field.name for field in msgspec.structs.fields(SamplingParams)}
# What other servers and OpenAI's API call them.
OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "repeat_penalty": "repetition_penalty",
}
LONGEST_NAME = 64  # characters of a name that is compared with ours
NULL_MEANS_SOMETHING = "max_new_tokens"  # there it is: until the context is full

NO_BUDGET = (
    "thinking_budget needs a model whose thoughts the server can tell apart: its chat template shows none, and "
    "--reasoning-parser does not name how they are marked."
)
NEEDS_TOKENIZER = "The tokenizer is not initialized (--skip-tokenizer-init); use input_ids and token ids instead of {}."


@dataclass(frozen=True, slots=True)
class Rules:
    """What this server allows."""

    vocab_size: int
    hidden_size: int
    adapters: Adapters = field(default_factory=Adapters)
    tokenizer: bool = True  # text in and out
    prefix_cache: bool = True
    priorities: bool = False
    routed_experts: bool = False  # requests may ask for the experts that their tokens chose
    hidden_states: bool = False  # and for hidden states
    most_requests: int = 4096  # of one call, copies included
    most_bytes: int = CALL_BYTES_PER_BODY_BYTE * (8 << 20)  # that they take on the ring together
    thought: Thought | None = None  # how the model thinks, where the server knows
    schedulers: int = 1
    longest_prompt: int = 1 << 30  # tokens that fit the context and the pool
    auto_truncate: bool = False  # longer prompts are cut unasked
    preferred: dict[str, Any] = field(default_factory=dict)  # sampling parameters laid under every request's own


@dataclass(slots=True)
class Job:
    """The requests of one HTTP call, in the order of its answer."""

    requests: list[Generate] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)  # the rid the client gave for each, or ""
    warm: list[Generate] = field(default_factory=list)  # run first, so that copies find their prompt in the cache
    warmed: list[int] = field(default_factory=list)  # for each of these, which request is its prompt's first copy
    background: bool = False  # goes on when its client has gone
    names: Mapping[str, str] = field(default_factory=dict)  # a parameter's name → the one that this call gave it


def fan_out(prompts: Sequence[Generate], rids: Sequence[str | None], rules: Rules) -> Job:
    """Check each prompt, then make n requests of it (a, a, b, b) with rids and seeds of their own.

    What the call comes to is counted before it is built: requests, values in their parameters, bytes on the ring.
    """
    check_all(prompts, rules)
    check_sum(prompts, rules)
    job = Job()
    alone = len(prompts) == 1 and prompts[0].request.params.n == 1
    call = "" if alone else uuid.uuid4().hex
    for prompt, rid in zip(prompts, rids, strict=True):
        copies = prompt.request.params.n
        if copies > 1 and rules.prefix_cache and not computes_whole(prompt.request):
            job.warm.append(warming(prompt))
            job.warmed.append(len(job.requests))
        for copy in range(copies):
            own = rid if rid is not None and copies == 1 else uuid.uuid4().hex
            own_seed = seed(prompt.request.params, copy)
            request = msgspec.structs.replace(prompt.request, rid=own, call=call, seed=own_seed)
            request.truncate = request.truncate or longest(request, rules)
            job.requests.append(msgspec.structs.replace(prompt, request=request))
            job.parents.append(rid or "")
    check_distinct([generate.request.rid for generate in job.requests])
    return job


def check_all(prompts: Sequence[Generate], rules: Rules) -> None:
    """Check each prompt; parameters that several share are looked at once."""
    known: set[tuple[int, int]] = set()
    for prompt in prompts:
        shared = (id(prompt.request.params), id(prompt.request.logprobs))
        if shared not in known:
            known.add(shared)
            check_parameters(prompt.request, rules)
        check_prompt(prompt, rules)


def check_sum(prompts: Sequence[Generate], rules: Rules) -> None:
    """Refuse a call that comes to more requests, values or bytes than one call may have."""
    requests = sum(prompt.request.params.n for prompt in prompts)
    if requests > rules.most_requests:
        raise RequestError(f"One call may hold at most {rules.most_requests} requests, got {requests}.")
    if requests < 2:
        return
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    values = size = 0
    for prompt in prompts:
        request = prompt.request
        shared = (id(request.params), id(request.logprobs))
        if shared not in sizes:
            sizes[shared] = (values_of(request), encoded_bytes(request))
        own_values, own_size = sizes[shared]
        values += own_values * request.params.n
        size += (own_size + prompt_bytes(prompt)) * request.params.n
    if values > limits.MAX_CALL_VALUES:
        raise RequestError(
            f"The parameters of the {requests} requests of this call hold {values} ids and strings (logit_bias, stop, "
            f"stop_token_ids, token_ids_logprob); at most {limits.MAX_CALL_VALUES} are taken.",
            Kind.TOO_LARGE,
        )
    check_bytes(requests, size, rules)


def check_bytes(requests: int, size: int, rules: Rules) -> None:
    """Refuse a call whose requests take so many bytes, if that is too many."""
    if size > rules.most_bytes:
        raise RequestError(
            f"The {requests} requests of this call take {size} bytes with their prompts and parameters; at most "
            f"{rules.most_bytes} are sent ({CALL_BYTES_PER_BODY_BYTE} times --max-body-size).",
            Kind.TOO_LARGE,
        )


def values_of(request: Request) -> int:
    """What of a request is looked at one by one wherever it passes."""
    params, asked = request.params, request.logprobs
    ids = len(params.logit_bias or ()) + len(params.stop_token_ids or ())
    return ids + len(params.stop_strings) + len(params.stop_patterns) + len((asked and asked.token_ids) or ())


def prompt_bytes(prompt: Generate) -> int:
    """The bytes that a prompt takes in each request, about."""
    texts = sum(len(text) if text.isascii() else len(text.encode()) for text in (prompt.text, prompt.text_pair) if text)
    chat = 0 if prompt.chat is None else encoded_bytes(prompt.chat)
    return texts + chat + len(prompt.input_ids) + len(prompt.embeds)


def encoded_bytes(part: msgspec.Struct) -> int:
    """The bytes that a part of a request takes on the ring. Raises RequestError for an integer of more than 64 bits."""
    try:
        return len(msgspec.msgpack.encode(part))
    except OverflowError as error:
        raise RequestError(OUT_OF_RANGE) from error


def longest(request: Request, rules: Rules) -> int | None:
    """Where a prompt is cut unasked: --allow-auto-truncate."""
    if not rules.auto_truncate:
        return None
    return rules.longest_prompt - (0 if request.task == "embed" else 1)


def seed(params: SamplingParams, copy: int) -> int:
    """The request's own seed, moved on by one for each copy so that they differ; or a random one."""
    if params.sampling_seed is None:
        return secrets.randbits(63)
    return (params.sampling_seed + copy + (1 << 63)) % (1 << 64) - (1 << 63)


def computes_whole(request: Request) -> bool:
    """What a request wants to know of its prompt is computed afresh, past any cached prefix."""
    scores_prompt = request.logprobs is not None and request.logprobs.start >= 0
    return scores_prompt or request.return_routed_experts or request.return_hidden_states


def warming(prompt: Generate) -> Generate:
    """The same prompt with no output: it leaves its KV in the prefix cache."""
    request = Request(
        rid=uuid.uuid4().hex,
        params=SamplingParams(max_new_tokens=0),
        adapter=prompt.request.adapter,
        extra_key=prompt.request.extra_key,
        wanted_rank=prompt.request.wanted_rank,
        priority=prompt.request.priority,
        log_metrics=False,
        truncate=prompt.request.truncate,
        truncate_side=prompt.request.truncate_side,
    )
    return msgspec.structs.replace(prompt, request=request)


def sampling_params(given: dict[str, Any] | None, rules: Rules) -> SamplingParams:
    """`given` laid over what the server prefers; null means the default. Raises RequestError or ValidationError."""
    asked = {key: value for key, value in (given or {}).items() if value is not None or key == NULL_MEANS_SOMETHING}
    if unknown := sorted(asked.keys() - PARAMETERS):
        raise RequestError(unknown_parameter(unknown[0]), field=unknown[0])
    return read_params({**rules.preferred, **asked}, rules.vocab_size)


def unknown_parameter(name: str) -> str:
    """Says which parameter is unknown, and which one may have been meant."""
    close = get_close_matches(name, sorted(PARAMETERS), 1, 0.8) if len(name) <= LONGEST_NAME else []
    meant = OTHER_NAMES.get(name) or (close[0] if close else "")
    return f"sampling_params has an unknown field `{name}`" + (f": did you mean `{meant}`?" if meant else ".")


def check_prompt(prompt: Generate, rules: Rules) -> None:
    """Raise RequestError (400, naming the field) for whatever can be known without the model."""
    request = prompt.request
    rules.adapters.check(request.adapter)
    if prompt.input_ids:
        check_input_ids(unpack_ids(prompt.input_ids), rules.vocab_size)
    if len(request.extra_key) > limits.MAX_KEY_CHARS:
        raise RequestError(f"extra_key may have at most {limits.MAX_KEY_CHARS} characters.", field="extra_key")
    if not rules.tokenizer:
        check_without_tokenizer(prompt)


def check_parameters(request: Request, rules: Rules) -> None:
    check_params(request.params, rules.vocab_size)
    refuse_unsupported(request.params)
    if request.logprobs is not None:
        check_logprob_options(request.logprobs, rules.vocab_size)


def refuse_unsupported(params: SamplingParams) -> None:
    """What the ring cannot do."""
    if params.custom_params is not None:
        raise RequestError(
            "custom_params is not supported: there are no custom logit processors.", field="custom_params"
        )


def check_without_tokenizer(prompt: Generate) -> None:
    """Raise RequestError for what needs a tokenizer, where the server has none."""
    params = prompt.request.params
    asks = {
        "text": prompt.text is not None or prompt.chat is not None,
        "stop": bool(params.stop_strings),
        "stop_regex": bool(params.stop_patterns),
        "min_new_tokens": params.min_new_tokens > 0,
        "thinking_budget": params.thinking_budget is not None,
        "return_text_in_logprobs": prompt.request.logprobs is not None and prompt.request.logprobs.text,
    }
    for name, asked in asks.items():
        if asked:
            raise RequestError(NEEDS_TOKENIZER.format(name), field=name)


def check_distinct(rids: list[str]) -> None:
    if len(set(rids)) < len(rids):
        twice = sorted(rid for rid, count in Counter(rids).items() if count > 1)
        raise RequestError(f"Duplicate request IDs detected within the request: {twice}", field="rid")
