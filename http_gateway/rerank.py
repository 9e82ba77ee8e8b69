"""POST|PUT /v1/rerank: documents by their fitness for a query, best first."""

import time
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from http_gateway import bodies, errors
from http_gateway.embed import NOT_A_CROSS_ENCODER, embed, embed_request, meta_info, numbers
from http_gateway.endpoint import Endpoint, require_json
from http_gateway.gateway import Gateway
from http_gateway.intake import Job, Rules, fan_out
from http_gateway.tasks import check_embeds
from runtime import limits
from runtime.errors import RequestError
from runtime.messages import Generate

EMPTY_QUERY = "Query cannot be empty"
BLANK_QUERY = "Query cannot be empty or whitespace only"
NO_DOCUMENTS = "Documents cannot be empty"
EMPTY_DOCUMENT = "Each document must be a non-empty string"
BLANK_DOCUMENT = "Each document cannot be empty or whitespace only"
BAD_TOP_N = "Value error, parameter top_n should be larger than 0."


class RerankBody(msgspec.Struct, kw_only=True):
    """Fields that are not here are ignored."""

    query: str
    documents: list[str]
    top_n: int | None = None
    return_documents: bool | None = None
    instruct: str | None = None


async def rerank(gateway: Gateway, http: HTTPRequest) -> Response:
    received_at = time.monotonic()
    require_json(http)
    body = await bodies.read(http, RerankBody)
    embedding = check_embeds(gateway)
    check(body)
    if not embedding.cross_encoder or embedding.labels != 1:
        raise RequestError(NOT_A_CROSS_ENCODER)
    ranked = []
    for index, text in enumerate(await embed(gateway, http, to_job(body, gateway.rules))):
        entry: dict[str, Any] = {"score": numbers(text)[0], "document": body.documents[index], "index": index}
        ranked.append({**entry, "meta_info": meta_info(gateway, text, received_at)})
    ranked.sort(key=lambda entry: -entry["score"])
    if body.return_documents is False:
        for entry in ranked:
            del entry["document"]
    return errors.json_response(ranked[: body.top_n])


def check(body: RerankBody) -> None:
    """Raise RequestError in the words that clients compare."""
    refusals = (
        (not body.query, EMPTY_QUERY),
        (not body.query.strip(), BLANK_QUERY),
        (not body.documents, NO_DOCUMENTS),
        (not all(body.documents), EMPTY_DOCUMENT),
        (not all(map(str.strip, body.documents)), BLANK_DOCUMENT),
        (body.top_n is not None and body.top_n < 1, BAD_TOP_N),
        (body.instruct is not None, "instruct is not supported: this is no instructed reranker."),
        (len(body.documents) > limits.MAX_BATCH_PROMPTS, f"At most {limits.MAX_BATCH_PROMPTS} documents are ranked."),
    )
    for holds, message in refusals:
        if holds:
            raise RequestError(message)


def to_job(body: RerankBody, rules: Rules) -> Job:
    """A pair for each document."""
    pairs = [Generate(request=embed_request(), text=body.query, text_pair=text) for text in body.documents]
    return fan_out(pairs, [None] * len(pairs), rules)


SHAPE = errors.saying(errors.openai, {"text": "documents", "prompt": "documents"})
ENDPOINTS = [Endpoint("/v1/rerank", rerank, ("POST", "PUT"), shape=SHAPE, body=RerankBody)]
