"""POST /v1/embeddings and /v1/classify: vectors, and the probabilities of a classifier's labels."""

import base64
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.embedding.encode import embed, embed_request, numbers, rendered
from quartet.http_gateway.embedding.prompts import Prompted, choose_vectors, prefix_of
from quartet.http_gateway.generation.intake import Job, Rules, fan_out
from quartet.http_gateway.generation.truncation import Truncating, read_truncation
from quartet.http_gateway.http import errors
from quartet.http_gateway.native.generate_body import asks, pack_prompt_ids, rids_per_prompt
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_embeds, check_one_vector, cut_to
from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, Request, Text
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.names import Name

EMPTY = "Input cannot be empty"
EMPTY_AT = "Input at index {} cannot be empty or whitespace only"
MIXED = "All items in input list must be {}"
NO_LABELS = "This model has no labels to classify by; use /v1/embeddings."
ONE_FORM = "encoding_format and embedding_type cannot be given at the same time."
KINDS = {str: "strings", int: "integers", list: "lists of integers", dict: "objects with a text"}
Form = Literal["float", "base64", "binary", "ubinary"]  # of a vector in an answer


class TextInput(msgspec.Struct):
    """An item of a multimodal input; only its text is served."""

    text: str | None = None
    image: Any = None


class EmbeddingsBody(Prompted, kw_only=True):
    """POST /v1/embeddings. Fields that are not here are ignored."""

    input: str | list[Any]
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    embedding_type: Form | None = None  # what Jina calls it
    normalize: bool | None = None  # to length 1; null: as the model's files say
    normalized: bool | None = None  # the same in Jina's words
    late_chunking: bool | None = None
    dimensions: int | None = None
    rid: Any = None
    lora_path: Any = None


class ClassifyBody(Truncating, kw_only=True):
    """POST /v1/classify. Fields that are not here are ignored."""

    input: str | list[Any]
    model: Name | None = None
    rid: Any = None


async def embeddings(gateway: Gateway, http: HTTPRequest) -> Response:
    """A vector for each item of the input."""
    require_json(http)
    body = await bodies.read_json_body(http, EmbeddingsBody)
    embedding = check_one_vector(gateway)
    dimensions = cut_to(gateway, embedding, body.dimensions)
    if asks(body.lora_path):
        raise RequestError("lora_path is not supported.", field="lora_path")
    if body.late_chunking:
        raise RequestError("late_chunking is not supported.", field="late_chunking")
    if body.encoding_format and body.embedding_type:
        raise RequestError(ONE_FORM, field="embedding_type")
    texts = await embed(gateway, http, await convert_body(http, vectors_job, body, dimensions, gateway))
    form = body.embedding_type or body.encoding_format or "float"

    def entry(text: Text, index: int) -> dict[str, Any]:
        return {"object": "embedding", "embedding": encoded(text, form), "index": index}

    rest = msgspec.json.encode({"model": gateway.config.name, "usage": prompt_usage(texts)})
    return await rendered(texts, entry, b'{"object":"list","data":[', b"]," + rest[1:])


async def classify(gateway: Gateway, http: HTTPRequest) -> Response:
    """A probability for each label of a classifier."""
    require_json(http)
    body = await bodies.read_json_body(http, ClassifyBody)
    embedding = check_embeds(gateway)
    if not embedding.labels:
        raise RequestError(NO_LABELS)
    request = embed_request(gateway.rules, truncation=read_truncation(body, "right"))
    texts = await embed(gateway, http, await convert_body(http, to_job, body, request, gateway.rules))
    names = gateway.model.config.get("id2label") or {}
    data = [classified(index, probabilities(numbers(text), embedding), names) for index, text in enumerate(texts)]
    answer = {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": gateway.config.name,
        "data": data,
        "usage": prompt_usage(texts),
    }
    return errors.json_response(answer)


# input


def vectors_job(body: EmbeddingsBody, dimensions: int | None, gateway: Gateway) -> Job:
    """The same with the model's prompt before each text. Raises RequestError."""
    given: Any = body.input
    first = given[0] if isinstance(given, list) and given else given
    texts, embedding = isinstance(first, str | dict), check_embeds(gateway)
    normalize = body.normalize if body.normalized is None else body.normalized
    request = embed_request(gateway.rules, dimensions, read_truncation(body, "right"), normalize=normalize)
    choose_vectors(request, body, embedding)
    return to_job(body, request, gateway.rules, prefix_of(body, embedding, texts=texts))


def to_job(body: EmbeddingsBody | ClassifyBody, request: Request, rules: Rules, prefix: str = "") -> Job:
    """One request, like `request`, per item of `input`, `prefix` before each text."""
    given: Any = body.input
    single = isinstance(given, str) or bool(given and isinstance(given[0], int))
    items = [given] if single else given
    if not items or given == "":
        raise RequestError(EMPTY, field="input")
    if len(items) > limits.MAX_BATCH_PROMPTS:
        raise RequestError(f"input may have at most {limits.MAX_BATCH_PROMPTS} items, got {len(items)}.", field="input")
    if single and isinstance(given, str):
        check_text(given, "Input cannot be empty or whitespace only")
    kind = type(items[0])
    if kind not in KINDS or any(type(item) is not kind for item in items):
        raise RequestError(MIXED.format(KINDS.get(kind, "strings")), field="input")
    prompts = [to_prompt(index, item, request, rules, prefix) for index, item in enumerate(items)]
    return fan_out(prompts, rids_per_prompt(body.rid, len(prompts), single), rules)


def to_prompt(index: int, item: Any, request: Request, rules: Rules, prefix: str) -> Generate:
    """The prompt of one item: token ids, a text, or an object with a text. Raises RequestError."""
    if isinstance(item, list):
        if any(type(token) is not int for token in item):
            raise RequestError(MIXED.format("integers"), field="input")
        if not item:
            raise RequestError(EMPTY_AT.format(index), field="input")
        return Generate(request=request, input_ids=pack_prompt_ids(item, rules.vocab_size))
    if isinstance(item, dict):
        item = text_of(item)
    check_text(item, EMPTY_AT.format(index))
    return Generate(request=request, text=prefix + item)


def text_of(item: dict[str, Any]) -> str:
    given = msgspec.convert(item, TextInput)
    if given.image is not None:
        raise RequestError("image is not supported.", field="input")
    return given.text or ""


def check_text(text: str, message: str) -> None:
    if not text.strip():
        raise RequestError(message, field="input")


# answer


def encoded(text: Text, form: Form) -> list[float] | list[int] | str:
    """A vector as numbers, as the base64 of its little-endian float32 bytes, or as the bits of its signs."""
    match form:
        case "base64":
            return base64.b64encode(text.tokens.vector).decode()
        case "float":
            return numbers(text)
        case _:
            return signs(numbers(text), signed=form == "binary")


def signs(vector: Sequence[float], signed: bool) -> list[int]:
    """Eight numbers in a byte, the first in its highest bit: 1 for those above zero. Signed bytes are less by 128."""
    padded = [*vector, *[0.0] * (-len(vector) % 8)]
    bits = (padded[start : start + 8] for start in range(0, len(padded), 8))
    offset = 128 if signed else 0
    return [sum((value > 0) << 7 - place for place, value in enumerate(eight)) - offset for eight in bits]


def prompt_usage(texts: list[Text]) -> dict[str, Any]:
    tokens = sum(text.tokens.prompt_tokens for text in texts)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}


def probabilities(scores: list[float], embedding: Embedding) -> list[float]:
    """A share for each label. Scores that the model's own activation has made into shares stay as they are."""
    if embedding.activation and not embedding.activation.endswith(".Identity"):
        return scores
    if len(scores) == 1:
        return [sigmoid(scores[0])]
    largest = max(scores)
    shares = [math.exp(score - largest) for score in scores]
    total = sum(shares)
    return [share / total for share in shares]


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score > -700 else 0.0


def classified(index: int, shares: list[float], names: dict[str, str]) -> dict[str, Any]:
    best = max(range(len(shares)), key=shares.__getitem__)
    label = names.get(str(best), f"LABEL_{best}")
    return {"index": index, "label": label, "probs": shares, "num_classes": len(shares)}


SHAPE = errors.with_client_names(errors.openai, {"input_ids": "input", "text": "input", "prompt": "input"})
ENDPOINTS = [
    Endpoint("/v1/embeddings", embeddings, ("POST",), shape=SHAPE, body=EmbeddingsBody),
    Endpoint("/v1/classify", classify, ("POST",), shape=SHAPE, body=ClassifyBody),
]
