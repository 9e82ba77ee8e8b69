"""The routes of Hugging Face's text-embeddings-inference, for clients that were written for that server.

/embed        a vector for each text
/similarity   how near each sentence is to a first one, as the cosine of their vectors
/predict      the labels of a classifier, best first
/rerank       with `texts` in place of `documents`, see rerank.py; /embed_all and /embed_sparse: see vectors.py
/             one of /embed, /predict and /rerank, as the model is: clients that know the server's address only
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from quartet.http_gateway.embedding.embeddings import NO_LABELS, probabilities
from quartet.http_gateway.embedding.encode import NOT_A_CROSS_ENCODER, embed, embed_request, numbers, rendered
from quartet.http_gateway.embedding.prompts import Prompted, choose_vectors, prefix_of
from quartet.http_gateway.embedding.rerank import ranking
from quartet.http_gateway.generation.intake import Job, fan_out
from quartet.http_gateway.generation.truncation import Truncating, read_truncation
from quartet.http_gateway.http import errors
from quartet.http_gateway.native.generate_body import check_batch, pack_prompt_ids
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_embeds, check_one_vector, cut_to
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, Text

NOT_BOOLEAN = "truncate must be true or false, got {!r}."
EMPTY = "inputs cannot be empty."
MIXED = "inputs must be a text, texts, or token ids."
NOT_A_TEXT = "inputs must be a text, a pair of texts, or a list of such; a text is a list of one, a pair a list of two."


class TextsBody(Prompted, kw_only=True):
    """What all routes that embed are given."""

    inputs: str | list[Any]


class EmbedBody(TextsBody, kw_only=True):
    """POST /embed. Fields that are not here are ignored."""

    normalize: bool = True
    dimensions: int | None = None


class PredictBody(Truncating, kw_only=True):
    """POST /predict. Fields that are not here are ignored."""

    inputs: str | list[Any]
    raw_scores: bool = False


class Sentences(msgspec.Struct):
    source_sentence: str
    sentences: list[str]


class SimilarityParameters(Prompted, kw_only=True):
    """How the texts are read."""


class SimilarityBody(msgspec.Struct, kw_only=True):
    """POST /similarity. Fields that are not here are ignored."""

    inputs: Sentences
    parameters: SimilarityParameters = msgspec.field(default_factory=SimilarityParameters)


async def embed_texts(gateway: Gateway, http: HTTPRequest) -> Response:
    """A list of vectors, for one text too."""
    body = await bodies.read_json_body(http, EmbedBody)
    check_truncate(body)
    embedding = check_one_vector(gateway)
    dimensions = cut_to(gateway, embedding, body.dimensions)
    job = await convert_body(http, texts_job, body, gateway, dimensions, body.normalize)
    return await rendered(await embed(gateway, http, job), lambda text, _: numbers(text))


def check_truncate(body: Truncating) -> None:
    """Raise RequestError unless `truncate` is what clients of text-embeddings-inference send."""
    if not isinstance(body.truncate, bool | None):
        raise RequestError(NOT_BOOLEAN.format(body.truncate), field="truncate")


def texts_job(body: TextsBody, gateway: Gateway, dimensions: int | None = None, normalize: bool | None = None) -> Job:
    """One request for each text or list of token ids. Raises RequestError."""
    given: Any = body.inputs
    single = isinstance(given, str) or bool(given and isinstance(given[0], int))
    items = [given] if single else given
    if not items or not all(items):
        raise RequestError(EMPTY, field="inputs")
    check_batch(len(items), "inputs")
    texts = isinstance(items[0], str)
    if any(isinstance(item, str) is not texts or not isinstance(item, str | list) for item in items):
        raise RequestError(MIXED, field="inputs")
    embedding = check_embeds(gateway)
    prefix = prefix_of(body, embedding, texts=texts)
    request = embed_request(gateway.rules, dimensions, read_truncation(body, "right"), normalize=normalize)
    choose_vectors(request, body, embedding)
    if texts:
        prompts = [Generate(request=request, text=prefix + item) for item in items]
    else:
        prompts = [Generate(request=request, input_ids=token_ids(item, gateway)) for item in items]
    return fan_out(prompts, [None] * len(prompts), gateway.rules)


def token_ids(item: Sequence[Any], gateway: Gateway) -> bytes:
    if any(type(token) is not int for token in item):
        raise RequestError(MIXED, field="inputs")
    return pack_prompt_ids(list(item), gateway.rules.vocab_size)


async def similarity(gateway: Gateway, http: HTTPRequest) -> Response:
    """The cosine of each sentence's vector with that of the first text, in order."""
    body = await bodies.read_json_body(http, SimilarityBody)
    check_truncate(body.parameters)
    check_one_vector(gateway)
    given = body.parameters
    prompted = EmbedBody(
        inputs=[body.inputs.source_sentence, *body.inputs.sentences],
        **{field: getattr(given, field) for field in given.__struct_fields__},
    )
    if not body.inputs.sentences:
        raise RequestError(EMPTY, field="inputs.sentences")
    job = await convert_body(http, texts_job, prompted, gateway, None, True)
    texts = await embed(gateway, http, job)
    return errors.json_response(await asyncio.to_thread(cosines, texts))


def cosines(texts: Sequence[Text]) -> list[float]:
    """Of the first vector with each other; all have length one."""
    source, *others = map(numbers, texts)
    return [sum(x * y for x, y in zip(source, other, strict=True)) for other in others]


async def predict(gateway: Gateway, http: HTTPRequest) -> Response:
    """Labels with their scores, best first; for several texts a list of such lists."""
    body = await bodies.read_json_body(http, PredictBody)
    check_truncate(body)
    embedding = check_embeds(gateway)
    if not embedding.labels:
        raise RequestError(NO_LABELS)
    prompts, single = await convert_body(http, predict_prompts, body, gateway)
    if not embedding.cross_encoder and any(prompt.text_pair is not None for prompt in prompts):
        raise RequestError(NOT_A_CROSS_ENCODER, field="inputs")
    texts = await embed(gateway, http, fan_out(prompts, [None] * len(prompts), gateway.rules))
    names = gateway.model.config.get("id2label") or {}
    found = []
    for text in texts:
        scores = numbers(text) if body.raw_scores else probabilities(numbers(text), embedding)
        labels = [{"score": score, "label": names.get(str(i), f"LABEL_{i}")} for i, score in enumerate(scores)]
        found.append(sorted(labels, key=lambda label: -label["score"]))
    return errors.json_response(found[0] if single else found)


def predict_prompts(body: PredictBody, gateway: Gateway) -> tuple[list[Generate], bool]:
    """A prompt for each text or pair, and whether there is one that is answered without a list around it."""
    given: Any = body.inputs
    pair = isinstance(given, list) and len(given) == 2 and all(isinstance(text, str) for text in given)
    single = isinstance(given, str) or pair
    items = [given] if single else given
    if not items:
        raise RequestError(EMPTY, field="inputs")
    check_batch(len(items), "inputs")
    request = embed_request(gateway.rules, truncation=read_truncation(body, "right"))
    prompts = []
    for item in items:
        texts = [item] if isinstance(item, str) else item
        if not isinstance(texts, list) or len(texts) not in (1, 2) or not all(isinstance(x, str) and x for x in texts):
            raise RequestError(NOT_A_TEXT, field="inputs")
        prompts.append(Generate(request=request, text=texts[0], text_pair=texts[1] if len(texts) == 2 else None))
    return prompts, single


async def answer_by_model(gateway: Gateway, http: HTTPRequest) -> ASGIApp:
    """What this model is for: vectors, labels, or the order of texts."""
    embedding = check_embeds(gateway)
    if embedding.cross_encoder and embedding.labels == 1:
        return await rank(gateway, http)
    return await (predict if embedding.labels else embed_texts)(gateway, http)


rank = ranking(with_documents=True)
SHAPE = errors.with_client_names(errors.native, {"input_ids": "inputs", "text": "inputs"})
ENDPOINTS = [
    Endpoint("/", answer_by_model, ("POST",), shape=SHAPE, body=EmbedBody),
    Endpoint("/embed", embed_texts, ("POST",), shape=SHAPE, body=EmbedBody),
    Endpoint("/similarity", similarity, ("POST",), shape=SHAPE, body=SimilarityBody),
    Endpoint("/predict", predict, ("POST",), shape=SHAPE, body=PredictBody),
]
