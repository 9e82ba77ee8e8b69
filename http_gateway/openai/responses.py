"""POST /v1/responses: OpenAI's newer API, for text. It is a chat completion in other shapes, which may be kept."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.generation.run_group import collect_group, stream_group
from quartet.http_gateway.http import errors
from quartet.http_gateway.http.sse import Event, EventStream, StreamFormat
from quartet.http_gateway.native.generate import check_servable
from quartet.http_gateway.openai.chat import ChatCall
from quartet.http_gateway.openai.params import DEFAULT_MODEL
from quartet.http_gateway.openai.response_input import PREFIX, chat_body, items_of
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
from quartet.http_gateway.openai.stored_responses import earlier_items, input_items
from quartet.http_gateway.ring.request_group import RequestDelta
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.response_store import StoredResponse
from quartet.runtime.errors import RequestError

log = logging.getLogger(__name__)

STATUSES = {"stop": COMPLETED, "tool_calls": COMPLETED, "length": INCOMPLETE}  # by the reason of a turn's end
ABORTED = "The request was aborted."


class ResponseCall:
    """One call of POST /v1/responses: the chat completion, and the response that it has become so far."""

    def __init__(self, gateway: Gateway, body: ResponsesBody, earlier: Sequence[dict[str, Any]]) -> None:
        """`earlier`: the items of the conversation before this call."""
        self.chat = ChatCall(gateway, chat_body(body, earlier))
        self.output = OutputItems(self.chat.id.removeprefix(PREFIX))
        self.store = gateway.stored_responses
        self.stored = body.store is not False
        self._body = body
        self._created_at = int(time.time())
        self._completed_at: int | None = None

    @property
    def id(self) -> str:
        return self.chat.id

    def status(self) -> str:
        """How the response has ended."""
        return STATUSES.get(self.chat.choices[0].finish_reason or "", FAILED)

    def take_whole(self) -> None:
        """The output of a call that is not streamed, when it is over."""
        for choice in self.chat.choices[0].next_chunks(0):
            self.output.take(choice.delta)

    async def end(self) -> None:
        """The output is over. The response is kept where it is to be; where that fails, it says so."""
        self.output.end()
        self._completed_at = int(time.time()) if self.status() == COMPLETED else None
        if not self.stored:
            return
        try:
            self.stored = await self.store.run(self._keep)
        except RequestError as error:
            log.error("Response %s is not kept: %s", self.id, error.message)
            self.stored = False

    def _keep(self) -> bool:
        given = msgspec.json.encode(input_items(items_of(self._body.input), self.chat.id.removeprefix(PREFIX)))
        response = msgspec.json.encode(self.response(self.status()))
        return self.store.put(self.id, self._body.previous_response_id, StoredResponse(given, response))

    def response(self, status: str, error: str = ABORTED) -> dict[str, Any]:
        """The response object. It has output and usage when it is over. `error`: why it has failed."""
        body, begun = self._body, status == IN_PROGRESS
        params = self.chat.job.requests[0].request.params
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": self._completed_at,
            "status": status,
            "model": body.model or DEFAULT_MODEL,
            "output": [] if begun else self.output.bodies(status),
            "usage": None if begun else self._usage(),
            "error": {"code": "server_error", "message": error} if status == FAILED else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == INCOMPLETE else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": body.reasoning or ReasoningOptions(),
            "store": self.stored,
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
        used = self.chat.usage()
        cached = self.chat.choices[0].state.cached_tokens
        return {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
            "total_tokens": used.total_tokens,
        }


class ResponseStream:
    """The events of a stream: the response and its items are opened, grow, and are closed."""

    def __init__(self, call: ResponseCall) -> None:
        self._call = call
        self._opened = False
        self._numbered = NumberedEvents()
        self._items = ItemEvents(self._numbered, call.output)
        self.form = StreamFormat(self.failure, b"response.failed", end=b"")

    def events(self, deltas: list[RequestDelta]) -> Iterator[Event]:
        """The events that are due after these deltas."""
        if not self._opened:
            self._opened = True
            response = self._call.response(IN_PROGRESS)
            yield self._numbered.event("response.created", response=response)
            yield self._numbered.event("response.in_progress", response=response)
        for chunk in self._call.chat.chunks(deltas):
            for choice in chunk.choices:
                self._call.output.take(choice.delta)
        yield from self._items.new_events()

    def last_events(self) -> Iterator[Event]:
        """The end of the open item and of the response."""
        status = self._call.status()
        yield from self._items.new_events()
        yield from self._items.close(last_status(status))
        yield self._numbered.event(f"response.{status}", response=self._call.response(status))

    def failure(self, error: RequestError) -> bytes:
        """The data of the last event of a stream that an error has ended."""
        self._call.stored = False
        response = self._call.response(FAILED, error.message)
        return self._numbered.event("response.failed", response=response).data


async def responses(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    """The next turn of a conversation, in the shapes of OpenAI's Responses API."""
    require_json(http)
    body = await bodies.read_json_body(http, ResponsesBody)
    check_servable(gateway, http)
    earlier = await earlier_items(gateway, http, body.previous_response_id)
    call = await convert_body(http, ResponseCall, gateway, body, earlier)
    if body.stream:
        stream = ResponseStream(call)
        return stream_group(
            gateway.ring, http, call.chat.job, stream.events, stream.last_events, stream.form, at_end=call.end
        )
    await collect_group(gateway.ring, http, call.chat.job, call.chat.take)
    call.take_whole()
    await call.end()
    return errors.json_response(call.response(call.status()))


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
ENDPOINTS = [Endpoint("/v1/responses", responses, ("POST",), shape=SHAPE, body=ResponsesBody)]
