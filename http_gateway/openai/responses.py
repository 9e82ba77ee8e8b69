"""POST /v1/responses: OpenAI's newer API, for text. It is a chat completion under another name; nothing is stored."""

import time
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.generation.run_group import collect_group, stream_group
from quartet.http_gateway.http import errors, sse
from quartet.http_gateway.http.sse import Event, EventStream
from quartet.http_gateway.native.generate import check_servable
from quartet.http_gateway.openai.chat import ChatCall
from quartet.http_gateway.openai.response_input import chat_body
from quartet.http_gateway.openai.response_items import (
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    INCOMPLETE,
    ItemEvents,
    NumberedEvents,
    OutputItems,
    last_status,
)
from quartet.http_gateway.openai.response_types import ReasoningOptions, ResponsesBody, TextFormat
from quartet.http_gateway.ring.request_group import RequestDelta
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.errors import Kind as ErrorKind
from quartet.runtime.errors import RequestError

NOT_STORED = "Response '{}' is not here: this server stores no responses."
STATUSES = {"stop": COMPLETED, "tool_calls": COMPLETED, "length": INCOMPLETE}  # by the reason of a turn's end


class ResponseAnswer:
    """The response object of a call, in whatever state it is."""

    def __init__(self, body: ResponsesBody, call: ChatCall) -> None:
        self._body = body
        self._call = call
        self._created_at = int(time.time())

    def status(self) -> str:
        return STATUSES.get(self._call.choices[0].finish_reason or "", FAILED)

    def response(self, status: str, output: OutputItems | None = None) -> dict[str, Any]:
        """`output`: of an answer that is over."""
        params = self._call.job.requests[0].request.params
        body = self._body
        return {
            "id": f"resp_{self._call.id}",
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "model": body.model or "default",
            "output": [] if output is None else output.bodies(status),
            "usage": None if output is None else self._usage(),
            "error": {"code": "server_error", "message": "aborted"} if status == FAILED else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == INCOMPLETE else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "max_tool_calls": body.max_tool_calls,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": body.reasoning or ReasoningOptions(),
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (body.text and body.text.format) or TextFormat("text")},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "background": False,
            "user": body.user,
        }

    def _usage(self) -> dict[str, Any]:
        used = self._call.usage()
        return {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": self._call.choices[0].state.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
            "total_tokens": used.total_tokens,
        }


async def responses(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    """A text in answer to a text or a conversation."""
    require_json(http)
    body = await bodies.read_json_body(http, ResponsesBody)
    check_servable(gateway, http)
    call = await convert_body(http, ChatCall, gateway, chat_body(body))
    answer = ResponseAnswer(body, call)
    if body.stream:
        stream = Stream(call, answer)
        return stream_group(gateway.ring, http, call.job, stream.events, stream.last_events, sse.OPENAI)
    await collect_group(gateway.ring, http, call.job, call.take)
    output = OutputItems(call.id)
    for choice in call.choices[0].next_chunks(0):
        output.take(choice.delta)
    output.end()
    return errors.json_response(answer.response(answer.status(), output))


class Stream:
    """The events of a stream: the response and its items are opened, grow, and are closed."""

    def __init__(self, call: ChatCall, answer: ResponseAnswer) -> None:
        self._call = call
        self._answer = answer
        self._opened = False
        self._numbered = NumberedEvents()
        self._output = OutputItems(call.id)
        self._items = ItemEvents(self._numbered, self._output)

    def events(self, deltas: list[RequestDelta]) -> Iterator[Event]:
        """The events that are due after these deltas."""
        if not self._opened:
            self._opened = True
            response = self._answer.response(IN_PROGRESS)
            yield self._numbered.event("response.created", response=response)
            yield self._numbered.event("response.in_progress", response=response)
        for chunk in self._call.chunks(deltas):
            for choice in chunk.choices:
                self._output.take(choice.delta)
        yield from self._items.new_events()

    def last_events(self) -> Iterator[Event]:
        """The end of the open item and of the response."""
        self._output.end()
        status = self._answer.status()
        response = self._answer.response(status, self._output)
        yield from self._items.new_events()
        yield from self._items.close(last_status(status))
        yield self._numbered.event(f"response.{status}", response=response)


async def stored(gateway: Gateway, http: HTTPRequest) -> Response:
    """A response of before; none is kept."""
    raise RequestError(NOT_STORED.format(http.path_params["id"]), ErrorKind.NOT_FOUND)


SHAPE = errors.with_client_names(
    errors.openai,
    {
        "max_new_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "messages": "input",
        "text": "input",
        "prompt": "input",
    },
)
ENDPOINTS = [
    Endpoint("/v1/responses", responses, ("POST",), shape=SHAPE, body=ResponsesBody),
    Endpoint("/v1/responses/{id}", stored, ("GET", "DELETE"), shape=errors.openai),
    Endpoint("/v1/responses/{id}/cancel", stored, ("POST",), shape=errors.openai),
]
