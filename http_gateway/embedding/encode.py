"""POST|PUT /encode and /classify: a vector per prompt; a score, where the model is a reward model or cross-encoder."""

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.embedding.prompts import Prompted, choose_vectors, prefix_of
from quartet.http_gateway.generation.intake import Job, Rules, fan_out
from quartet.http_gateway.generation.output import finish_reason
from quartet.http_gateway.generation.run_group import collect_group
from quartet.http_gateway.generation.truncation import Truncation, read_truncation
from quartet.http_gateway.native.generate_body import asks, check_batch, pack_prompt_ids, rids_per_prompt
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_embeds, cut_to
from quartet.runtime import limits
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Generate, Request, Text, unpack_ids
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.sampling import SamplingParams

NOTHING_GIVEN = "At least one of text, input_ids, or image should be provided"
BOTH_GIVEN = "text and input_ids cannot be provided at the same time"
TOO_MUCH = "The vectors of this call have {} numbers together; at most {} are sent. Send fewer texts at once."
FLOAT_BYTES = 4
FEW_BYTES = 1 << 16  # of vectors, which are written at once
NOT_A_CROSS_ENCODER = "This model is no cross-encoder: it reads one text at a time, not pairs."
REFUSED = ("image_data", "audio_data", "video_data", "lora_path", "return_pooled_hidden_states")


class EncodeBody(Prompted, kw_only=True):
    """`sampling_params` and whatever is not here are accepted and ignored, as the contract has it."""

    text: str | list[str | list[str]] | None = None  # a list of two: a pair for a cross-encoder
    input_ids: list[int | list[int]] | None = None
    rid: Any = None
    dimensions: int | None = None
    log_metrics: bool | None = None
    background: bool | None = None
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    lora_path: Any = None
    return_pooled_hidden_states: Any = None


def to_job(body: EncodeBody, rules: Rules, embedding: Embedding) -> tuple[Job, bool]:
    """The Job, and whether one object (not a list) answers it."""
    for name in REFUSED:
        if asks(getattr(body, name)):
            raise RequestError(f"{name} is not supported.", field=name)
    single = isinstance(body.text, str) or bool(body.input_ids and isinstance(body.input_ids[0], int))
    prompts = read_prompts(body, single, rules)
    choose_vectors(prompts[0].request, body, embedding)  # which all of them share
    if prefix := prefix_of(body, embedding, texts=body.text is not None):
        for prompt in prompts:
            prompt.text = f"{prefix}{prompt.text}"
    job = fan_out(prompts, rids_per_prompt(body.rid, len(prompts), single), rules)
    job.background = bool(body.background)
    return job, single


def read_prompts(body: EncodeBody, single: bool, rules: Rules) -> list[Generate]:
    """One Generate per prompt. Raises RequestError unless exactly one of text and input_ids is given."""
    if body.text is not None and body.input_ids is not None:
        raise RequestError(BOTH_GIVEN, field="text")
    given: Any = body.text if body.text is not None else body.input_ids
    if not given:
        raise RequestError(NOTHING_GIVEN, field="text")
    items = [given] if single else given
    check_batch(len(items), "text" if body.text is not None else "input_ids")
    request = request_of(body, rules)  # which all of them share until they get their rids
    if body.input_ids is not None:
        return [Generate(request=request, input_ids=pack_prompt_ids(ids, rules.vocab_size)) for ids in items]
    return [text_prompt(item, request) for item in items]


def text_prompt(item: str | list[str], request: Request) -> Generate:
    if isinstance(item, str):
        return Generate(request=request, text=item)
    if len(item) != 2:
        raise RequestError(f"A pair has two texts, got {len(item)}.", field="text")
    return Generate(request=request, text=item[0], text_pair=item[1])


def request_of(body: EncodeBody, rules: Rules) -> Request:
    truncation = read_truncation(body, "right")
    return embed_request(rules, body.dimensions, truncation, log_metrics=body.log_metrics is not False)


def embed_request(
    rules: Rules,
    dimensions: int | None = None,
    truncation: Truncation | None = None,
    *,
    normalize: bool | None = None,
    log_metrics: bool = True,
) -> Request:
    """A request for a vector, still without a rid."""
    params = SamplingParams(max_new_tokens=0)
    request = Request(rid="", params=params, task="embed", dimensions=dimensions, log_metrics=log_metrics)
    request.normalize = normalize
    if truncation is not None:
        truncation.apply(request, rules)
    return request


async def encode(gateway: Gateway, http: HTTPRequest) -> Response:
    """A vector or score for each prompt."""
    received_at = time.monotonic()
    body = await bodies.read_json_body(http, EncodeBody)
    embedding = check_embeds(gateway)
    body.dimensions = cut_to(gateway, embedding, body.dimensions)
    job, single = await convert_body(http, to_job, body, gateway.rules, embedding)
    if not embedding.cross_encoder and any(item.text_pair is not None for item in job.requests):
        raise RequestError(NOT_A_CROSS_ENCODER, field="text")
    vectors = await embed(gateway, http, job)
    size = embedding.token_size(gateway.model.hidden_size)

    def entry(text: Text, index: int) -> dict[str, Any]:
        return {"embedding": own_vector(text, embedding, size), "meta_info": meta_info(gateway, text, received_at)}

    return await rendered(vectors, entry, b"", b"") if single else await rendered(vectors, entry)


async def embed(gateway: Gateway, http: HTTPRequest, job: Job) -> list[Text]:
    """The message that holds each request's vector or vectors, in order.

    Raises RequestError when one was aborted, and for more numbers than an answer may have: before anything is computed
    where each text has one vector, else as soon as there are too many.
    """
    embedding = check_embeds(gateway)
    if embedding.gives_one_vector and not any(item.request.vectors == "tokens" for item in job.requests):
        size = embedding.labels or embedding.size(gateway.model.hidden_size)
        check_numbers(sum(item.request.dimensions or size for item in job.requests))
    answers: list[Text | None] = [None] * len(job.requests)
    count = 0

    def take(index: int, text: Text) -> None:
        nonlocal count
        if has_vector_or_end(text):
            answers[index] = text
            count += len(text.tokens.vector) // FLOAT_BYTES
            check_numbers(count)

    await collect_group(gateway.ring, http, job, take)
    texts = [text for text in answers if text is not None]
    assert len(texts) == len(answers), (len(texts), len(answers))
    if lost := [text for text in texts if not text.tokens.vector and is_lost(text, embedding)]:
        finish = lost[0].tokens.finish
        raise RequestError(f"Request {lost[0].tokens.rid} was aborted: {finish.message if finish else 'no vector'}")
    return texts


def check_numbers(count: int) -> None:
    if count > limits.MAX_VECTOR_NUMBERS:
        raise RequestError(TOO_MUCH.format(count, limits.MAX_VECTOR_NUMBERS), Kind.TOO_LARGE)


def is_lost(text: Text, embedding: Embedding) -> bool:
    """Whether a text without numbers was not computed. One without words of weight or tokens that count has none."""
    finish = text.tokens.finish
    return embedding.gives_one_vector or finish is None or finish.reason != "length"


async def rendered(
    texts: Sequence[Text], entry: Callable[[Text, int], Any], before: bytes = b"[", behind: bytes = b"]"
) -> Response:
    """A JSON answer with an entry for each text. Many numbers are written in a thread, text by text."""

    def written() -> bytes:
        return before + b",".join(msgspec.json.encode(entry(text, i)) for i, text in enumerate(texts)) + behind

    few = sum(len(text.tokens.vector) for text in texts) < FEW_BYTES
    return Response(written() if few else await asyncio.to_thread(written), media_type="application/json")


def has_vector_or_end(text: Text) -> bool:
    return bool(text.tokens.vector) or text.tokens.finish is not None


def numbers(text: Text) -> list[float]:
    """A request's vector or scores."""
    values = array("f")
    values.frombytes(text.tokens.vector)
    return values.tolist()


def rows(text: Text, size: int) -> list[list[float]]:
    """The vectors of a text's tokens, each of so many numbers."""
    values = numbers(text)
    return [values[start : start + size] for start in range(0, len(values), size)]


def own_vector(text: Text, embedding: Embedding, size: int) -> Any:
    """What a model is made for: numbers, a bare one where it scores pairs, rows of `size`, or words with weights."""
    if embedding.multi_vector is not None:
        return rows(text, size)
    values = numbers(text)
    if embedding.sparse is not None:
        words = unpack_ids(text.tokens.vector_ids)
        return [{"index": word, "value": value} for word, value in zip(words, values, strict=True)]
    return values[0] if text.tokens.scalar else values


def meta_info(gateway: Gateway, text: Text, received_at: float) -> dict[str, Any]:
    """The `meta_info` object of one vector."""
    tokens = text.tokens
    return {
        "id": tokens.rid,
        "finish_reason": finish_reason(tokens.finish) if tokens.finish else None,
        "prompt_tokens": tokens.prompt_tokens,
        "weight_version": tokens.weight_version or gateway.weight_version,
        "e2e_latency": time.monotonic() - received_at,
    }


ENDPOINTS = [Endpoint(path, encode, ("POST", "PUT"), body=EncodeBody) for path in ("/encode", "/classify")]
