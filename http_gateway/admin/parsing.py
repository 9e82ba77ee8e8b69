"""POST /parse_function_call and /separate_reasoning: the parsers of a chat's answer, for text made elsewhere."""

import asyncio

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.http.errors import json_response
from quartet.http_gateway.parsers import reasoning, tool_calls
from quartet.http_gateway.parsers.tool_events import Tool
from quartet.http_gateway.routes.endpoint import Endpoint, read_body
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.limits import MAX_PARSED_BODY_BYTES


class ParseBody(msgspec.Struct):
    text: str
    tools: list[Tool]
    tool_call_parser: str | None = None  # the server's own by default


class ParsedCall(msgspec.Struct):
    tool_index: int
    name: str
    parameters: str  # JSON text


class ParseAnswer(msgspec.Struct):
    normal_text: str
    calls: list[ParsedCall]


class SeparateBody(msgspec.Struct):
    text: str
    reasoning_parser: str | None = None  # the server's own by default


class SeparateAnswer(msgspec.Struct):
    reasoning_text: str
    text: str


async def parse_function_call(gateway: Gateway, http: HTTPRequest) -> Response:
    """The tool calls in a text, and what is beside them."""
    body = msgspec.json.decode(await read_body(http, MAX_PARSED_BODY_BYTES), type=ParseBody)
    name = body.tool_call_parser or gateway.config.tool_call_parser or ""
    form = tool_calls.format_of(name)
    whole = await asyncio.to_thread(tool_calls.parse, form, body.tools, body.text)
    found = [ParsedCall(index, call.name, call.arguments) for index, call in enumerate(whole.calls)]
    return json_response(ParseAnswer(whole.content, found))


async def separate_reasoning(gateway: Gateway, http: HTTPRequest) -> Response:
    """The thought in a text, and the answer behind it."""
    body = msgspec.json.decode(await read_body(http, MAX_PARSED_BODY_BYTES), type=SeparateBody)
    name = body.reasoning_parser or gateway.config.reasoning_parser or ""
    thought, answer = await asyncio.to_thread(reasoning.split, name, body.text)
    return json_response(SeparateAnswer(thought, answer))


ENDPOINTS = [
    Endpoint("/parse_function_call", parse_function_call, ("POST",), body=ParseBody, answer=ParseAnswer),
    Endpoint("/separate_reasoning", separate_reasoning, ("POST",), body=SeparateBody, answer=SeparateAnswer),
]
