"""From the body of an OpenAI request to the ring's own parameters, and to the Job of its prompts."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec

from quartet.http_gateway.generation.intake import Job, fan_out, sampling_params
from quartet.http_gateway.generation.rank_choice import chosen_rank
from quartet.http_gateway.generation.truncation import read_truncation
from quartet.http_gateway.http import errors
from quartet.http_gateway.native.generate_body import (
    HIDDEN_STATES_OFF,
    TWO_BUDGETS,
    asks,
    rids_per_prompt,
    with_distribution,
)
from quartet.http_gateway.openai.response_format import field_of_grammar, grammar, vllm_grammars
from quartet.http_gateway.openai.types import REFUSED, CompletionBody, GenerationBody
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, LogprobOptions, Request
from quartet.runtime.sampling import GRAMMARS, SamplingParams

DEFAULT_MODEL = "default"
RENAMED = {"min_tokens": "min_new_tokens", "seed": "sampling_seed"}
CLIENT_NAMES = {ours: theirs for theirs, ours in RENAMED.items()} | {
    "max_new_tokens": "max_tokens",
    "call_grammar": "tools",
}  # as errors name them
SHARED_FIELDS = tuple(
    field.name
    for field in msgspec.structs.fields(SamplingParams)
    if field.name in {own.name for own in msgspec.structs.fields(GenerationBody)}
)
OF_THE_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def model_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says about sampling. Its top_k 0 is our -1: the whole vocabulary."""
    found = {name: value for name in OF_THE_MODEL if (value := generation_config.get(name)) is not None}
    return found | ({"top_k": -1} if found.get("top_k") == 0 else {})


def params_of(
    gateway: Gateway,
    body: GenerationBody,
    fixed: Mapping[str, int | None],
    fallback: Mapping[str, Any],
    forced: tuple[str, str] | None = None,
) -> SamplingParams:
    """The parameters of a request: what it says over the operator's over the model's over `fallback`.

    `fixed`: what the endpoint has read itself, such as max_new_tokens. `forced`: the grammar of a demanded tool call.
    """
    refuse_unsupported_fields(body)
    given = {name: value for name in SHARED_FIELDS if (value := getattr(body, name)) is not None}
    given |= {new: value for old, new in RENAMED.items() if (value := getattr(body, old)) is not None}
    add_grammar(given, body, forced)
    from_model = gateway.config.sampling_defaults == "model"
    under = model_defaults(gateway.model.generation_config) if from_model else {}
    preferred = {**fallback, **under, **gateway.rules.preferred}
    with naming(names_of(body, [kind for kind in GRAMMARS if kind in given])):
        return sampling_params(given | dict(fixed), replace(gateway.rules, preferred=preferred))


def budget_of(body: GenerationBody) -> int | None:
    """The most tokens of a thought, under either of its names. Raises RequestError where they disagree."""
    first, second = body.thinking_budget, body.max_thinking_tokens
    if None not in (first, second) and first != second:
        raise RequestError(TWO_BUDGETS, field="max_thinking_tokens")
    return second if first is None else first


def add_grammar(given: dict[str, Any], body: GenerationBody, forced: tuple[str, str] | None) -> None:
    """Add the grammar that the body asks for, or the forced one. Raises RequestError where there would be several."""
    asked = [("response_format", grammar(body.response_format)), *vllm_grammars(body), ("tool_choice", forced)]
    constraints = [(name, constraint) for name, constraint in asked if constraint is not None]
    names = [*(kind for kind in GRAMMARS if kind in given), *(name for name, _ in constraints)]
    if constraints and len(names) > 1:
        raise RequestError(
            f"The output can be constrained by one thing only, got {' and '.join(names)}.", field=names[-1]
        )
    for _, (kind, text) in constraints:
        given[kind] = text


def names_of(body: GenerationBody, kinds: list[str]) -> dict[str, str]:
    """By the name of the parameter that holds the one grammar of a request: the field that its client has sent."""
    name = field_of_grammar(body)
    return {} if len(kinds) != 1 or name == kinds[0] else {kinds[0]: name, "grammar": name}


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that are raised within name the client's fields."""
    try:
        yield
    except RequestError as error:
        raise errors.renamed(error, names) from None


def refuse_unsupported_fields(body: GenerationBody) -> None:
    for name in REFUSED:
        if asks(getattr(body, name)):
            raise RequestError(f"{name} is not supported.", field=name)


def adapters_of(gateway: Gateway, body: GenerationBody, size: int, single: bool) -> list[str]:
    """The adapter of each prompt: `lora_path`, else what `model` names; "" is the base. Raises RequestError."""
    given = body.lora_path
    if isinstance(given, list):
        if single:
            raise RequestError("lora_path is a list, and there is one prompt: name one adapter.", field="lora_path")
        if len(given) != size:
            raise RequestError(f"lora_path has {len(given)} items for {size} prompts.", field="lora_path")
        return [name or "" for name in given]
    return [given or gateway.adapters.of_model(body.model or "", gateway.base_names)] * size


def job_of(
    gateway: Gateway,
    body: GenerationBody,
    prompts: list[Generate],
    single: bool,
    params: SamplingParams,
    logprobs: LogprobOptions | None,
) -> tuple[str, Job]:
    """The id of the answer and the Job: n requests for each prompt, all to be found by that id."""
    if body.priority and not gateway.rules.priorities:
        raise RequestError("priority needs a server started with --enable-priority-scheduling.", field="priority")
    if len(prompts) > limits.MAX_BATCH_PROMPTS:
        raise RequestError(f"A batch may have at most {limits.MAX_BATCH_PROMPTS} prompts, got {len(prompts)}.")
    completion = isinstance(body, CompletionBody)  # there the ids of the prompt come with those of the output
    hidden = bool(body.return_hidden_states)
    if hidden and not gateway.rules.hidden_states:
        raise RequestError(HIDDEN_STATES_OFF, field="return_hidden_states")
    options = with_distribution(logprobs, bool(body.return_entropy), bool(body.return_sampling_mask), params)
    truncation = read_truncation(body, "left")
    rank = chosen_rank(body, gateway.rules.schedulers)
    for prompt, adapter in zip(prompts, adapters_of(gateway, body, len(prompts), single), strict=True):
        prompt.request = Request(
            rid="",
            params=params,
            logprobs=options,
            stream=bool(body.stream),
            adapter=adapter,
            extra_key=(body.extra_key or "") + (body.cache_salt or ""),
            wanted_rank=rank,
            priority=body.priority or 0,
            return_hidden_states=hidden,
            return_prompt_ids=bool(body.return_prompt_token_ids or (completion and body.return_token_ids)),
            log_metrics=body.log_metrics is not False,
        )
        if truncation is not None:
            truncation.apply(prompt.request, gateway.rules)
    rid = uuid.uuid4().hex if body.rid is None else body.rid
    rids = rids_per_prompt(rid, len(prompts), single)
    names = names_of(body, [params.grammar[0]] if params.grammar else [])
    with naming(names):
        job = fan_out(prompts, rids, gateway.rules)
    job.names = names
    if isinstance(rid, str):
        job.parents = [rid] * len(job.requests)
    job.background = bool(body.background)
    return rid if isinstance(rid, str) else rid[0], job
