"""What endpoints ask the tokenizer and the detokenizer, besides the requests of a generation."""

from typing import Any

from quartet.http_gateway.http import errors
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.control import ControlCommand, Detokenize, Tokenize
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Reply, unpack_ids

TIMEOUT_S = 60.0


async def tokens_of(gateway: Gateway, command: Tokenize) -> list[list[int]]:
    """The ids of each text of a command."""
    return [unpack_ids(ids).tolist() for ids in (await ask(gateway, command))["tokens"]]


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
        kind = errors.KIND_OF_STATUS.get(reply.status, Kind.BAD_REQUEST)
        raise RequestError(reply.message, kind, reply.field, reply.code)
    return reply.body or {}
