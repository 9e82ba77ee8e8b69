"""Documents by their fitness for a query, best first.

/v1/rerank      a bare list with the model's own scores
/rerank         the shape of Jina: documents are returned, scores are shares between 0 and 1
/v2/rerank      that of Cohere: the same without the documents
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.embedding.embeddings import probabilities, prompt_usage
from quartet.http_gateway.embedding.encode import NOT_A_CROSS_ENCODER, embed, embed_request, meta_info, numbers
from quartet.http_gateway.generation.intake import Job, Rules, fan_out
from quartet.http_gateway.generation.truncation import Truncating, read_truncation
from quartet.http_gateway.http import errors
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, Handler, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_embeds
from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, Text
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.names import Name

EMPTY_QUERY = "Query cannot be empty"
BLANK_QUERY = "Query cannot be empty or whitespace only"
NO_DOCUMENTS = "Documents cannot be empty"
EMPTY_DOCUMENT = "Each document must be a non-empty string"
BLANK_DOCUMENT = "Each document cannot be empty or whitespace only"
TOO_MANY = f"At most {limits.MAX_BATCH_PROMPTS} documents are ranked."
BAD_TOP_N = "Value error, parameter top_n should be larger than 0."


class RerankBody(Truncating, kw_only=True):
    """Fields that are not here are ignored."""

    query: str
    documents: list[str]
    top_n: int | None = None
    return_documents: bool | None = None
    instruct: str | None = None


class Document(msgspec.Struct):
    text: str


class RankBody(Truncating, kw_only=True):
    """POST /rerank and /v2/rerank. Fields that are not here are ignored."""

    query: str
    documents: list[str | Document]
    model: Name | None = None
    top_n: int | None = None
    return_documents: bool | None = None


async def rerank(gateway: Gateway, http: HTTPRequest) -> Response:
    """The documents with the model's scores, best first."""
    received_at = time.monotonic()
    require_json(http)
    body = await bodies.read_json_body(http, RerankBody)
    check_reranks(gateway)
    check_query(body.query, body.documents, body.top_n)
    if body.instruct is not None:
        raise RequestError("instruct is not supported: this is no instructed reranker.", field="instruct")
    job = to_job(body, body.documents, gateway.rules)
    ranked = []
    for index, text in enumerate(await embed(gateway, http, job)):
        entry: dict[str, Any] = {"score": numbers(text)[0], "document": body.documents[index], "index": index}
        ranked.append({**entry, "meta_info": meta_info(gateway, text, received_at)})
    ranked.sort(key=lambda entry: -entry["score"])
    if body.return_documents is False:
        for entry in ranked:
            del entry["document"]
    return errors.json_response(ranked[: body.top_n])


def ranking(with_documents: bool) -> Handler:
    """The handler of a route that tells the documents, or does not, unless its client says."""

    async def rank(gateway: Gateway, http: HTTPRequest) -> Response:
        """Documents by their fitness for a query, best first, in the shape of Jina and Cohere."""
        require_json(http)
        body = await bodies.read_json_body(http, RankBody)
        embedding = check_reranks(gateway)
        documents = [document if isinstance(document, str) else document.text for document in body.documents]
        check_query(body.query, documents, body.top_n)
        texts = await embed(gateway, http, to_job(body, documents, gateway.rules))
        returned = with_documents if body.return_documents is None else body.return_documents
        results: list[dict[str, Any]] = []
        for index in best_first(texts)[: body.top_n]:
            [share] = probabilities(numbers(texts[index]), embedding)
            shown = {"document": {"text": documents[index]}} if returned else {}
            results.append({"index": index, "relevance_score": share, **shown})
        answer = {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": gateway.name,
            "results": results,
            "usage": prompt_usage(texts),
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        }
        return errors.json_response(answer)

    return rank


def best_first(texts: Sequence[Text]) -> list[int]:
    """Places by score, the first of equals first."""
    return sorted(range(len(texts)), key=lambda index: -numbers(texts[index])[0])


def check_reranks(gateway: Gateway) -> Embedding:
    """Raises RequestError where the model does not score pairs."""
    embedding = check_embeds(gateway)
    if not embedding.cross_encoder or embedding.labels != 1:
        raise RequestError(NOT_A_CROSS_ENCODER)
    return embedding


def check_query(query: str, documents: Sequence[str], top_n: int | None) -> None:
    """Raise RequestError in the words that clients compare."""
    refusals = (
        ("query", not query, EMPTY_QUERY),
        ("query", not query.strip(), BLANK_QUERY),
        ("documents", not documents, NO_DOCUMENTS),
        ("documents", not all(documents), EMPTY_DOCUMENT),
        ("documents", not all(map(str.strip, documents)), BLANK_DOCUMENT),
        ("top_n", top_n is not None and top_n < 1, BAD_TOP_N),
        ("documents", len(documents) > limits.MAX_BATCH_PROMPTS, TOO_MANY),
    )
    for field, holds, message in refusals:
        if holds:
            raise RequestError(message, field=field)


def to_job(body: RerankBody | RankBody, documents: Sequence[str], rules: Rules) -> Job:
    """A pair for each document."""
    request = embed_request(rules, truncation=read_truncation(body, "right"))
    pairs = [Generate(request=request, text=body.query, text_pair=text) for text in documents]
    return fan_out(pairs, [None] * len(pairs), rules)


SHAPE = errors.with_client_names(errors.openai, {"text": "documents", "prompt": "documents"})
ENDPOINTS = [
    Endpoint("/v1/rerank", rerank, ("POST", "PUT"), shape=SHAPE, body=RerankBody),
    Endpoint("/rerank", ranking(with_documents=True), ("POST",), shape=SHAPE, body=RankBody),
    Endpoint("/v2/rerank", ranking(with_documents=False), ("POST",), shape=SHAPE, body=RankBody),
]
