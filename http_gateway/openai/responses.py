"""POST /v1/responses: OpenAI's newer API, for text. It is a chat completion under another name; nothing is stored."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.generation.run_group import collect_group, stream_group
from quartet.http_gateway.http import errors, sse
from quartet.http_gateway.http.sse import Event, EventStream
from quartet.http_gateway.native.generate import check_servable
from quartet.http_gateway.native.generate_body import asks
from quartet.http_gateway.openai.answers import ChatMessage, Delta
from quartet.http_gateway.openai.chat import ChatCall
from quartet.http_gateway.openai.response_format import ResponseFormat
from quartet.http_gateway.openai.response_items import IN_PROGRESS, Item, ItemEvents, Kind, Numbered, OutputItems
from quartet.http_gateway.openai.types import ChatBody, Count
from quartet.http_gateway.ring.request_group import RequestDelta
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.errors import Kind as ErrorKind
from quartet.runtime.errors import RequestError

NOT_STORED = "Response '{}' is not here: this server stores no responses."
PARTS = ("text", "input_text", "output_text")
FAILED, COMPLETED, INCOMPLETE = "failed", "completed", "incomplete"


class TextOptions(msgspec.Struct):
    format: ResponseFormat | None = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """POST /v1/responses. `store` is accepted and answered with false."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None
    # refused
    tools: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    include: Any = None


PREFIX = "resp_"  # of ids
REFUSED = ("tools", "previous_response_id", "conversation", "background", "prompt", "include")


def chat_body(body: ResponsesBody) -> ChatBody:
    """The chat completion that this request is. Raises RequestError."""
    for name in REFUSED:
        if asks(getattr(body, name)):
            raise RequestError(f"{name} is not supported.", field=name)
    said = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else list(map(message, body.input))
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return ChatBody(
        rid=f"{PREFIX}{uuid.uuid4().hex}",  # the response's id: /abort_request takes it
        messages=system + said,
        model=body.model,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        response_format=body.text.format if body.text else None,
    )


def message(item: dict[str, Any]) -> dict[str, Any]:
    """An input item as a chat message."""
    if item.get("type", "message") != "message":
        raise RequestError(f"Input items of type {item['type']!r} are not supported: only messages are.", field="input")
    content = item.get("content")
    if isinstance(content, list):
        content = [part_of(part) for part in content]
    return {"role": item.get("role"), "content": content}


def part_of(part: Any) -> dict[str, Any]:
    if isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise RequestError("Content parts must be text: {type: input_text, text}.", field="input")


class ResponseAnswer:
    """The response object of a call, in whatever state it is."""

    def __init__(self, body: ResponsesBody, call: ChatCall) -> None:
        self._body = body
        self._call = call
        self._created_at = int(time.time())

    def status(self) -> str:
        reason = self._call.choices[0].finish_reason
        return {"stop": COMPLETED, "length": INCOMPLETE}.get(reason or "", FAILED)

    def response(self, status: str, items: Sequence[Item] | None = None) -> dict[str, Any]:
        """`items`: of an answer that is over."""
        params = self._call.job.requests[0].request.params
        body = self._body
        return {
            "id": self._call.id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "model": body.model or "default",
            "output": [item.body(status if item is items[-1] else COMPLETED) for item in items] if items else [],
            "usage": None if items is None else self._usage(),
            "error": {"code": "server_error", "message": "aborted"} if status == FAILED else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == INCOMPLETE else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}} if body.text is None else body.text,
            "tool_choice": "none",
            "tools": [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def _usage(self) -> dict[str, Any]:
        used = self._call.usage()
        return {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self._call.choices[0].state.cached_tokens},
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
    message = call.choices[0].whole(0).message
    output = OutputItems(call.id.removeprefix(PREFIX))
    for kind, text in texts_of(message):
        output.take(kind, text)
    output.end()
    return errors.json_response(answer.response(answer.status(), output.items))


def texts_of(part: ChatMessage | Delta) -> Iterator[tuple[Kind, str]]:
    """The texts of a message, or of what is new of one."""
    if part.reasoning_content:
        yield "reasoning", part.reasoning_content
    if part.content:
        yield "message", part.content


class Stream:
    """The events of a stream: the response and its items are opened, grow, and are closed."""

    def __init__(self, call: ChatCall, answer: ResponseAnswer) -> None:
        self._call = call
        self._answer = answer
        self._opened = False
        self._numbered = Numbered()
        self._output = OutputItems(call.id.removeprefix(PREFIX))
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
                for kind, text in texts_of(choice.delta):
                    self._output.take(kind, text)
        yield from self._items.new_events()

    def last_events(self) -> Iterator[Event]:
        """The end of the open item and of the response."""
        self._output.end()
        status = self._answer.status()
        response = self._answer.response(status, self._output.items)
        yield from self._items.new_events()
        yield from self._items.close(status)
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
