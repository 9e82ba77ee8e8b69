"""Documents by their fitness for a query, best first.

/v1/rerank      a bare list with the model's own scores
/rerank         the shape of Jina: documents are returned, scores are shares between 0 and 1
/v2/rerank      that of Cohere: the same without the documents
                with `texts` in place of `documents`, both answer as text-embeddings-inference does
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.embedding.embeddings import prompt_usage
from quartet.http_gateway.embedding.encode import meta_info
from quartet.http_gateway.embedding.fitness import Fitness, Ranking, fitness
from quartet.http_gateway.http import errors
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, Handler, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.names import Name

EMPTY_QUERY = "Query cannot be empty"
BLANK_QUERY = "Query cannot be empty or whitespace only"
NO_DOCUMENTS = "Documents cannot be empty"
EMPTY_DOCUMENT = "Each document must be a non-empty string"
BLANK_DOCUMENT = "Each document cannot be empty or whitespace only"
ONE_LIST = "documents and texts cannot be given at the same time."
TOO_MANY = f"At most {limits.MAX_BATCH_PROMPTS} documents are ranked."
BAD_TOP_N = "Value error, parameter top_n should be larger than 0."


class RerankBody(Ranking, kw_only=True):
    """Fields that are not here are ignored."""

    documents: list[str]
    top_n: int | None = None
    return_documents: bool | None = None


class Document(msgspec.Struct):
    text: str


class RankBody(Ranking, kw_only=True):
    """POST /rerank and /v2/rerank. Fields that are not here are ignored."""

    documents: list[str | Document] | None = None
    texts: list[str] | None = None  # text-embeddings-inference; the answer is in its shape then
    model: Name | None = None
    raw_scores: bool = False  # with texts
    return_text: bool = False
    top_n: int | None = None
    return_documents: bool | None = None


async def rerank(gateway: Gateway, http: HTTPRequest) -> Response:
    """The documents with the model's scores, best first."""
    received_at = time.monotonic()
    require_json(http)
    body = await bodies.read_json_body(http, RerankBody)
    check_query(body.query, body.documents, body.top_n)
    ranked = []
    for index, found in enumerate(await fitness(gateway, http, body, body.documents)):
        entry: dict[str, Any] = {"score": found.score, "document": body.documents[index], "index": index}
        ranked.append({**entry, "meta_info": meta_info(gateway, found.text, received_at)})
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
        if body.documents is not None and body.texts is not None:
            raise RequestError(ONE_LIST, field="texts")
        given: Sequence[str | Document] = body.documents or body.texts or ()
        documents = [document if isinstance(document, str) else document.text for document in given]
        check_query(body.query, documents, body.top_n)
        found = await fitness(gateway, http, body, documents)
        returned = with_documents if body.return_documents is None else body.return_documents
        if body.texts is not None:
            return errors.json_response([tei_entry(found[i], i, body) for i in best_first(found)[: body.top_n]])
        results: list[dict[str, Any]] = []
        for index in best_first(found)[: body.top_n]:
            shown = {"document": {"text": documents[index]}} if returned else {}
            results.append({"index": index, "relevance_score": found[index].share, **shown})
        answer = {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": gateway.name,
            "results": results,
            "usage": prompt_usage([fit.text for fit in found]),
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        }
        return errors.json_response(answer)

    return rank


def tei_entry(found: Fitness, index: int, body: RankBody) -> dict[str, Any]:
    """A document in the shape of text-embeddings-inference."""
    assert body.texts is not None
    entry = {"index": index, "score": found.score if body.raw_scores else found.share}
    return {**entry, "text": body.texts[index]} if body.return_text else entry


def best_first(found: Sequence[Fitness]) -> list[int]:
    """Places by score, the first of equals first."""
    return sorted(range(len(found)), key=lambda index: -found[index].score)


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


SHAPE = errors.with_client_names(errors.openai, {"text": "documents", "prompt": "documents"})
ENDPOINTS = [
    Endpoint("/v1/rerank", rerank, ("POST", "PUT"), shape=SHAPE, body=RerankBody),
    Endpoint("/rerank", ranking(with_documents=True), ("POST",), shape=SHAPE, body=RankBody),
    Endpoint("/v2/rerank", ranking(with_documents=False), ("POST",), shape=SHAPE, body=RankBody),
]
