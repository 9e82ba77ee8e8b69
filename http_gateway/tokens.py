"""POST /tokenize and /detokenize: the tokenizer on its own, text to ids and back."""

from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from http_gateway import errors
from http_gateway.endpoint import Endpoint, read_body
from http_gateway.gateway import Gateway
from http_gateway.tool_events import Tool
from runtime import limits
from runtime.control import ControlCommand, Detokenize, Tokenize
from runtime.errors import Kind, RequestError
from runtime.messages import Chat, Reply, pack_ids

TIMEOUT_S = 60.0
ONE_SOURCE = "Either prompt or messages should be provided."
BAD_IDS = "tokens must be a list of token ids, or a list of such lists."


class TokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeAnswer(msgspec.Struct, kw_only=True):
    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizeBody(msgspec.Struct, kw_only=True):
    tokens: list[int | list[int]]
    model: str | None = None
    skip_special_tokens: bool | None = None


class DetokenizeAnswer(msgspec.Struct):
    text: str | list[str]


async def tokenize(gateway: Gateway, http: HTTPRequest) -> Response:
    """The ids of a text, of many, or of a conversation in the model's form."""
    body = msgspec.json.decode(await read_body(http), type=TokenizeBody)
    found = (await ask(gateway, command_of(body)))["tokens"]
    single = not isinstance(body.prompt, list)
    tokens = found[0] if single else found
    count = len(found[0]) if single else [len(ids) for ids in found]
    return errors.json_response({"tokens": tokens, "count": count, "max_model_len": gateway.facts.context_length})


def command_of(body: TokenizeBody) -> Tokenize:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(ONE_SOURCE, field="prompt")
    if body.messages is not None:
        return Tokenize(
            chat=Chat(
                messages=body.messages,
                tools=[tool.plain() for tool in body.tools] if body.tools else None,
                add_generation_prompt=body.add_generation_prompt is not False,
                template_kwargs=body.chat_template_kwargs or {},
            )
        )
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt or []
    check_count(texts, "prompt")
    return Tokenize(texts=texts, add_special_tokens=body.add_special_tokens is not False)


async def detokenize(gateway: Gateway, http: HTTPRequest) -> Response:
    """The text of token ids, or of many lists of them."""
    body = msgspec.json.decode(await read_body(http), type=DetokenizeBody)
    many = bool(body.tokens) and isinstance(body.tokens[0], list)
    lists: list[Any] = body.tokens if many else [body.tokens]
    check_count(lists, "tokens")
    texts = await detokenize_ids(gateway, [packed(ids) for ids in lists], body.skip_special_tokens is not False)
    return errors.json_response({"text": texts if many else texts[0]})


def packed(ids: Any) -> bytes:
    try:
        return pack_ids(ids)
    except (TypeError, OverflowError):
        raise RequestError(BAD_IDS, field="tokens") from None


def check_count(items: list[Any], field: str) -> None:
    if len(items) > limits.MAX_BATCH_PROMPTS:
        raise RequestError(f"{field} may have at most {limits.MAX_BATCH_PROMPTS} items, got {len(items)}.", field=field)


async def detokenize_ids(
    gateway: Gateway, ids: list[bytes], skip_special_tokens: bool = True, *, open_end: bool = False
) -> list[str]:
    """The text of each list of ids; `open_end`: without an unfinished last character. Raises RequestError."""
    command = Detokenize(ids=ids, skip_special_tokens=skip_special_tokens, open_end=open_end)
    found = await ask(gateway, command)
    texts: list[str] = found["texts"]
    return texts


async def ask(gateway: Gateway, command: ControlCommand) -> dict[str, Any]:
    """What a service of the ring replies. Raises RequestError for a refusal."""
    try:
        reply = await gateway.ring.command(command, TIMEOUT_S)
    except TimeoutError:
        raise RequestError(f"No answer within {TIMEOUT_S:.0f} s.", Kind.UNAVAILABLE) from None
    assert isinstance(reply, Reply), reply
    if not reply.success:
        raise RequestError(reply.message, errors.KIND_OF_STATUS.get(reply.status, Kind.BAD_REQUEST))
    return reply.body or {}


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
