"""POST /v1/responses/input_tokens: how many tokens the prompt of a response would have."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.http import errors
from quartet.http_gateway.native.generate import check_servable
from quartet.http_gateway.openai.item_references import with_items
from quartet.http_gateway.openai.response_history import earlier_items
from quartet.http_gateway.openai.response_input import chat_body
from quartet.http_gateway.openai.response_tools import offered
from quartet.http_gateway.openai.response_types import ResponsesBody
from quartet.http_gateway.openai.responses import SHAPE
from quartet.http_gateway.openai.tokens import ids_of_chat
from quartet.http_gateway.openai.types import ChatBody
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway


class InputTokensBody(ResponsesBody, kw_only=True):
    """A request of /v1/responses. The conversation may also be a kept one as it is."""

    input: str | list[dict[str, Any]] = []


class InputTokens(msgspec.Struct, kw_only=True):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


async def input_tokens(gateway: Gateway, http: HTTPRequest) -> Response:
    """The number of tokens that such a request would have computed: its instructions, tools and conversation."""
    require_json(http)
    body: ResponsesBody = await bodies.read_json_body(http, InputTokensBody)
    check_servable(gateway, http)
    body = await with_items(gateway, http, body)
    earlier = await earlier_items(gateway, http, body.previous_response_id)
    chat, headers = await convert_body(http, converted, body, gateway.config.leave_out_hosted_tools, earlier)
    count = len(await ids_of_chat(gateway, http, chat))
    return errors.json_response(InputTokens(input_tokens=count), headers=headers)


def converted(
    body: ResponsesBody, leave_out: bool, earlier: Sequence[dict[str, Any]]
) -> tuple[ChatBody, dict[str, str]]:
    """The chat completion that it would be, and headers of the answer. Raises RequestError."""
    tools = offered(body, leave_out)
    return chat_body(body, tools, earlier), tools.headers()


ENDPOINTS = [
    Endpoint(
        "/v1/responses/input_tokens", input_tokens, ("POST",), shape=SHAPE, body=InputTokensBody, answer=InputTokens
    )
]
