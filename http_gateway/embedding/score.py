"""POST /v1/score: how likely a generating model finds each label behind a query and an item."""

import math
from array import array

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.embedding.embeddings import prompt_usage
from quartet.http_gateway.generation.intake import Job, Rules, fan_out
from quartet.http_gateway.generation.run_group import collect_answers
from quartet.http_gateway.http import errors
from quartet.http_gateway.native.generate_body import pack_prompt_ids
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_generates
from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, LogprobOptions, Request, Text
from quartet.runtime.sampling import SamplingParams

ONE_KIND = "query and items must both be texts or both be token ids"


class ScoreBody(msgspec.Struct, kw_only=True):
    """Fields that are not here are ignored."""

    query: str | list[int]
    items: str | list[str | list[int]]
    label_token_ids: list[int]
    apply_softmax: bool | None = None  # shares among the labels, rather than in the whole vocabulary
    item_first: bool | None = None
    temperature: float | None = None
    return_token_logprobs: bool | None = None


async def score(gateway: Gateway, http: HTTPRequest) -> Response:
    """For each item, the probabilities of the labels as the next token."""
    require_json(http)
    body = await bodies.read_json_body(http, ScoreBody)
    check_generates(gateway)
    check_score_body(body)
    texts = await first_tokens(gateway, http, await convert_body(http, to_job, body, gateway.rules))
    scores = [shares(label_logprobs(text), bool(body.apply_softmax)) for text in texts]
    answer = {"scores": scores, "model": gateway.config.name, "usage": prompt_usage(texts), "object": "scoring"}
    return errors.json_response(answer)


def check_score_body(body: ScoreBody) -> None:
    """Raise RequestError, naming the field, for what is empty, too much or not supported."""
    if not body.label_token_ids:
        raise RequestError("label_token_ids cannot be empty", field="label_token_ids")
    if not body.items:
        raise RequestError("items cannot be empty", field="items")
    if len(body.items) > limits.MAX_BATCH_PROMPTS and isinstance(body.items, list):
        raise RequestError(f"At most {limits.MAX_BATCH_PROMPTS} items are scored at once.", field="items")
    if body.temperature not in (None, 1.0):
        raise RequestError("temperature is not supported: scores are the model's own.", field="temperature")
    if body.return_token_logprobs:
        raise RequestError("return_token_logprobs is not supported.", field="return_token_logprobs")


def to_job(body: ScoreBody, rules: Rules) -> Job:
    """One prompt per item; the distribution behind it is that of the one token asked for."""
    items = [body.items] if isinstance(body.items, str) else body.items
    options = LogprobOptions(token_ids=body.label_token_ids)
    params = SamplingParams(max_new_tokens=1, temperature=1.0, ignore_eos=True)
    request = Request(rid="", params=params, logprobs=options)
    prompts = []
    for item in items:
        parts = (item, body.query) if body.item_first else (body.query, item)
        prompts.append(to_prompt(parts, request, rules))
    return fan_out(prompts, [None] * len(prompts), rules)


def to_prompt(parts: tuple[str | list[int], str | list[int]], request: Request, rules: Rules) -> Generate:
    match parts:
        case str(first), str(second):
            return Generate(request=request, text=first + second)
        case list(first), list(second):
            return Generate(request=request, input_ids=pack_prompt_ids(first + second, rules.vocab_size))
    raise RequestError(ONE_KIND, field="items")


async def first_tokens(gateway: Gateway, http: HTTPRequest, job: Job) -> list[Text]:
    """The message with each request's logprobs, in order."""
    answers = await collect_answers(gateway.ring, http, job, lambda text: text.tokens.logprobs is not None)
    texts = [text for text in answers if text is not None]
    if len(texts) < len(answers):
        raise RequestError("The scoring was aborted.")
    return texts


def label_logprobs(text: Text) -> list[float]:
    values = array("f")
    assert text.tokens.logprobs is not None
    values.frombytes(text.tokens.logprobs.asked_values)
    return values.tolist()


def shares(logprobs: list[float], among_labels: bool) -> list[float]:
    """Probabilities, of all tokens or of the labels alone."""
    largest = max(logprobs) if among_labels else 0.0
    if largest == -math.inf:
        return [1 / len(logprobs)] * len(logprobs)
    found = [math.exp(value - largest) for value in logprobs]
    total = sum(found)
    return [value / total for value in found] if among_labels else found


SHAPE = errors.with_client_names(
    errors.openai,
    {"token_ids_logprob": "label_token_ids", "input_ids": "items", "text": "items", "prompt": "items"},
)
ENDPOINTS = [Endpoint("/v1/score", score, ("POST",), shape=SHAPE, body=ScoreBody)]
