"""Vectors of single tokens, and weights of words.

/embed_all      the vector of each token, as text-embeddings-inference answers
/embed_sparse   the words that a text is about, with their weights, likewise
/pooling        what the model is made for, or what `task` names, in the shape of vLLM
"""

import base64
import time
import uuid
from typing import Any, Literal

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.embedding.embeddings import prompt_usage
from quartet.http_gateway.embedding.encode import embed, own_vector, rendered, rows
from quartet.http_gateway.embedding.prompts import Prompted
from quartet.http_gateway.embedding.tei import SHAPE, TextsBody, check_truncate, texts_job
from quartet.http_gateway.generation.intake import Job
from quartet.http_gateway.http import errors
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_embeds, check_one_vector, cut_to
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Text
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.names import Name

NOT_SPARSE = "This model does not weigh words (it is no SPLADE model); use /embed."
IN_PIECES = "This model computes texts in pieces, so it gives no vectors of single tokens; use /embed."
SCORES = "This model scores texts and gives no vectors; use /predict or /classify."
WEIGHS = "This model weighs words and gives no vectors of tokens; use /embed_sparse."


class AllBody(TextsBody, kw_only=True):
    """POST /embed_all and /embed_sparse. Fields that are not here are ignored."""


class PoolingBody(Prompted, kw_only=True):
    """POST /pooling. Fields that are not here are ignored."""

    input: str | list[Any]
    model: Name | None = None
    task: Literal["embed", "token_embed"] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None


async def embed_all(gateway: Gateway, http: HTTPRequest) -> Response:
    """For each text a list of vectors, one for each token."""
    body = await bodies.read_json_body(http, AllBody)
    check_truncate(body)
    embedding = check_tokens(check_embeds(gateway))
    texts = await embed(gateway, http, await convert_body(http, tokens_job, body, gateway, embedding))
    size = embedding.token_size(gateway.model.hidden_size)
    return await rendered(texts, lambda text, _: rows(text, size))


async def embed_sparse(gateway: Gateway, http: HTTPRequest) -> Response:
    """For each text a list of words of the vocabulary with their weights."""
    body = await bodies.read_json_body(http, AllBody)
    check_truncate(body)
    if check_embeds(gateway).sparse is None:
        raise RequestError(NOT_SPARSE)
    texts = await embed(gateway, http, await convert_body(http, texts_job, body, gateway))
    return await rendered(texts, lambda text, _: own_vector(text, check_embeds(gateway), 0))


async def pooling(gateway: Gateway, http: HTTPRequest) -> Response:
    """A vector for each text, one for each of its tokens, or weights of words."""
    require_json(http)
    body = await bodies.read_json_body(http, PoolingBody)
    embedding = check_embeds(gateway)
    wanted = body.task or ("token_embed" if embedding.multi_vector else None)
    if wanted == "token_embed":
        check_tokens(embedding)
        check_whole(body)
    elif wanted == "embed":
        check_one_vector(gateway)
    dimensions = cut_to(gateway, embedding, body.dimensions)
    texts = await embed(gateway, http, await convert_body(http, pooling_job, body, wanted, dimensions, gateway))
    size = embedding.token_size(gateway.model.hidden_size)

    def entry(text: Text, index: int) -> dict[str, Any]:
        found: Any = base64.b64encode(text.tokens.vector).decode()
        if body.encoding_format != "base64" or text.tokens.vector_ids:
            found = rows(text, size) if wanted == "token_embed" else own_vector(text, embedding, size)
        return {"index": index, "object": "pooling", "data": found}

    about = {"id": f"pool-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": gateway.name}
    end = errors.json_response({**about, "usage": prompt_usage(texts)}).body
    return await rendered(texts, entry, b'{"data":[', b"]," + bytes(end)[1:])


def tokens_job(body: AllBody, gateway: Gateway, embedding: Embedding) -> Job:
    """A request for each text's vectors: those that a multi-vector model is made for, or all of them."""
    job = texts_job(body, gateway)
    if embedding.multi_vector is None:
        for item in job.requests:
            item.request.vectors = "tokens"
    return job


def pooling_job(body: PoolingBody, wanted: str | None, dimensions: int | None, gateway: Gateway) -> Job:
    """One request for each text or list of ids of `input`. Raises RequestError."""
    fields = {name: getattr(body, name) for name in Prompted.__struct_fields__ if name != "task"}
    asked = AllBody(inputs=body.input, **fields)
    if wanted == "token_embed":
        return tokens_job(asked, gateway, check_embeds(gateway))
    return texts_job(asked, gateway, dimensions, body.normalize)


def check_whole(body: PoolingBody) -> None:
    """Raise RequestError where tokens' vectors are to be cut or left as they are."""
    for field in ("dimensions", "normalize"):
        if getattr(body, field) is not None:
            raise RequestError(f"{field} is not supported for the vectors of tokens.", field=field)


def check_tokens(embedding: Embedding) -> Embedding:
    """Raise RequestError where a model has no vectors of single tokens."""
    if embedding.labels:
        raise RequestError(SCORES)
    if embedding.sparse is not None:
        raise RequestError(WEIGHS)
    if not embedding.whole_prompts:
        raise RequestError(IN_PIECES)
    return embedding


POOLING_SHAPE = errors.with_client_names(
    errors.openai, {"input_ids": "input", "text": "input", "prompt": "input", "inputs": "input"}
)
ENDPOINTS = [
    Endpoint("/embed_all", embed_all, ("POST",), shape=SHAPE, body=AllBody),
    Endpoint("/embed_sparse", embed_sparse, ("POST",), shape=SHAPE, body=AllBody),
    Endpoint("/pooling", pooling, ("POST",), shape=POOLING_SHAPE, body=PoolingBody),
]
