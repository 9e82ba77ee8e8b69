"""POST /tokenize and /detokenize: the tokenizer on its own, text to ids and back."""

from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.http import errors
from quartet.http_gateway.openai.chat_body import choosing, prompt_of
from quartet.http_gateway.openai.types import ChatBody
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, read_body
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.token_questions import detokenize_ids, tokens_of
from quartet.runtime import limits
from quartet.runtime.control import Tokenize
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import pack_ids, unpack_ids
from quartet.runtime.names import Name

NULL = b"null"
ONE_SOURCE = "Either prompt or messages should be provided."
BAD_IDS = "tokens must be a list of token ids, or a list of such lists."


class TokenizeBody(msgspec.Struct, kw_only=True):
    """A prompt, or a conversation with all that a chat completion takes: it is read and rendered as one."""

    model: Name | None = None
    prompt: str | list[str] | None = None
    add_special_tokens: bool | None = None
    messages: list[dict[str, Any]] | None = None


class TokenizeAnswer(msgspec.Struct, kw_only=True):
    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizeBody(msgspec.Struct, kw_only=True):
    tokens: list[int | list[int]]
    model: Name | None = None
    skip_special_tokens: bool | None = None


class DetokenizeAnswer(msgspec.Struct):
    text: str | list[str]


async def tokenize(gateway: Gateway, http: HTTPRequest) -> Response:
    """The ids of a text, of many, or of a conversation in the model's form."""
    body = await convert_body(http, decoded, await read_body(http))
    if isinstance(body, ChatBody):
        found, single = [await ids_of_chat(gateway, http, body)], True
    else:
        command = await convert_body(http, command_of, body)
        found, single = await tokens_of(gateway, command), not isinstance(body.prompt, list)
    tokens = found[0] if single else found
    count = len(found[0]) if single else [len(ids) for ids in found]
    return errors.json_response({"tokens": tokens, "count": count, "max_model_len": gateway.facts.context_length})


def decoded(raw: bytes) -> ChatBody | TokenizeBody:
    """The body: a conversation, or a prompt. Raises RequestError for one that is both, and as `decode_json_body`."""
    given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    prompt, messages = (bytes(given.get(name, NULL)) != NULL for name in ("prompt", "messages"))
    if prompt and messages:
        raise RequestError(ONE_SOURCE, field="prompt")
    return bodies.decode_json_body(raw, ChatBody) if messages else bodies.decode_json_body(raw, TokenizeBody)


async def ids_of_chat(gateway: Gateway, http: HTTPRequest, body: ChatBody) -> list[int]:
    """The prompt of a chat completion."""
    choice = choosing(body, gateway.config.tool_call_parser)
    prompt = await convert_body(http, prompt_of, body, choice, gateway.rules.vocab_size)
    if prompt.chat is None:
        return unpack_ids(prompt.input_ids).tolist()
    return (await tokens_of(gateway, Tokenize(chat=prompt.chat)))[0]


def command_of(body: TokenizeBody) -> Tokenize:
    if body.prompt is None:
        raise RequestError(ONE_SOURCE, field="prompt")
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt or []
    check_count(texts, "prompt")
    return Tokenize(texts=texts, add_special_tokens=body.add_special_tokens is not False)


async def detokenize(gateway: Gateway, http: HTTPRequest) -> Response:
    """The text of token ids, or of many lists of them."""
    body = await bodies.read_json_body(http, DetokenizeBody)
    many = bool(body.tokens) and isinstance(body.tokens[0], list)
    lists: list[Any] = body.tokens if many else [body.tokens]
    check_count(lists, "tokens")
    check_ids_count(sum(len(ids) for ids in lists if isinstance(ids, list)))
    ids = await convert_body(http, lambda: list(map(packed, lists)))
    texts = await detokenize_ids(gateway, ids, body.skip_special_tokens is not False)
    return errors.json_response({"text": texts if many else texts[0]})


def packed(ids: Any) -> bytes:
    try:
        return pack_ids(ids)
    except (TypeError, OverflowError):
        raise RequestError(BAD_IDS, field="tokens") from None


def check_count(items: list[Any], field: str) -> None:
    if len(items) > limits.MAX_BATCH_PROMPTS:
        raise RequestError(f"{field} may have at most {limits.MAX_BATCH_PROMPTS} items, got {len(items)}.", field=field)


def check_ids_count(count: int) -> None:
    if count > limits.MAX_DETOKENIZED:
        raise RequestError(
            f"At most {limits.MAX_DETOKENIZED} ids are decoded in one call, got {count}.", field="tokens"
        )


ENDPOINTS = [
    *(
        Endpoint(path, tokenize, ("POST",), shape=errors.openai, body=TokenizeBody, answer=TokenizeAnswer)
        for path in ("/tokenize", "/v1/tokenize")
    ),
    *(
        Endpoint(path, detokenize, ("POST",), shape=errors.openai, body=DetokenizeBody, answer=DetokenizeAnswer)
        for path in ("/detokenize", "/v1/detokenize")
    ),
]
