"""A call of POST /v1/responses: a chat completion in other shapes, which may be kept, and the events of its stream."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from quartet.http_gateway.http.sse import Event, StreamFormat
from quartet.http_gateway.openai.chat import ChatCall
from quartet.http_gateway.openai.params import DEFAULT_MODEL
from quartet.http_gateway.openai.response_history import input_items
from quartet.http_gateway.openai.response_input import PREFIX, chat_body, items_of
from quartet.http_gateway.openai.response_items import (
    CANCELLED,
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    INCOMPLETE,
    QUEUED,
    ItemEvents,
    NumberedEvents,
    OutputItems,
    last_status,
)
from quartet.http_gateway.openai.response_tools import offered
from quartet.http_gateway.openai.response_types import ReasoningOptions, ResponsesBody, TextFormat
from quartet.http_gateway.ring.request_group import RequestDelta
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.response_store import StoredResponse
from quartet.runtime.errors import Kind, RequestError

log = logging.getLogger(__name__)

STATUSES = {"stop": COMPLETED, "tool_calls": COMPLETED, "length": INCOMPLETE}  # by the reason of a turn's end
CUT_OFF = "max_output_tokens"  # of the API's reasons the only one for an output that ended too early
LAST_EVENTS = {CANCELLED: FAILED}  # the API has no event for a response that was cancelled
ABORTED = RequestError("The request was aborted.", Kind.INTERNAL)
LOST = RequestError("The server ended before the response was complete.", Kind.INTERNAL)
TOO_LARGE = RequestError("The response is larger than the store of responses (--responses-store-size).", Kind.INTERNAL)


class ResponseCall:
    """One call of POST /v1/responses: the chat completion, and the response that it has become so far."""

    def __init__(self, gateway: Gateway, body: ResponsesBody, earlier: Sequence[dict[str, Any]]) -> None:
        """`earlier`: the items of the conversation before this call."""
        self._tools = offered(body, gateway.config.leave_out_hosted_tools)
        self.headers = self._tools.headers()
        self.chat = ChatCall(gateway, chat_body(body, self._tools, earlier))
        self.output = OutputItems(self.chat.id.removeprefix(PREFIX), self._tools.full_names)
        self.store = gateway.stored_responses
        self.stored = body.store is not False
        self.body = body
        self.error = ABORTED  # why it has failed, where it has
        self._outcome: str | None = None  # where something else than the turn's end decides
        self._created_at = int(time.time())
        self._completed_at: int | None = None

    @property
    def id(self) -> str:
        return self.chat.id

    def status(self) -> str:
        """How the response has ended. A call that was broken off cannot be carried out, whatever has ended it."""
        choice = self.chat.choices[0]
        ended = INCOMPLETE if choice.cut_by_stop else STATUSES.get(choice.finish_reason or "", FAILED)
        return self._outcome or ended

    def take_whole(self) -> None:
        """The output of a call that is not streamed, when it is over."""
        for choice in self.chat.choices[0].next_chunks(0):
            self.output.take(choice.delta)

    def fail(self, error: RequestError) -> None:
        """An error has ended the response."""
        self._outcome, self.error = FAILED, error

    def cancel(self) -> None:
        """A client has cancelled the response."""
        self._outcome = CANCELLED

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

    def size(self) -> int:
        """Bytes of the request, as the response and the store have them."""
        return len(msgspec.json.encode(self.body.input)) + len(msgspec.json.encode(self.response(QUEUED)))

    async def keep_as_lost(self) -> None:
        """Keep the response as it would be if the server ended now. Raises RequestError where it cannot be kept."""
        if not await self.store.run(self._put, self.response(FAILED, LOST)):
            raise RequestError(TOO_LARGE.message, field="background")

    def _keep(self) -> bool:
        if self._put(self.response(self.status())):
            return True
        if self.body.background:  # its client finds out why there is nothing
            self.output.items.clear()
            self.fail(TOO_LARGE)
            return self._put(self.response(FAILED))
        return False

    def _put(self, response: dict[str, Any]) -> bool:
        given = msgspec.json.encode(input_items(items_of(self.body.input), self.id.removeprefix(PREFIX)))
        kept = StoredResponse(given, msgspec.json.encode(response))
        return self.store.put(self.id, self.body.previous_response_id, kept)

    def response(self, status: str, error: RequestError | None = None) -> dict[str, Any]:
        """The response object. It has output and usage when it is over. `error`: why it has failed."""
        body, begun = self.body, status in (QUEUED, IN_PROGRESS)
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
            "error": described(error or self.error) if status == FAILED else None,
            "incomplete_details": {"reason": CUT_OFF} if status == INCOMPLETE else None,
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
            "tools": self._tools.shown,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "background": bool(body.background),
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


def described(error: RequestError) -> dict[str, str]:
    """An error as a response has it."""
    code = "server_error" if error.kind.status >= Kind.INTERNAL.status else "invalid_prompt"
    return {"code": code, "message": error.message}


class ResponseStream:
    """The events of a stream: the response and its items are opened, grow, and are closed."""

    def __init__(self, call: ResponseCall) -> None:
        self._call = call
        self._created = False
        self._begun = False
        self._numbered = NumberedEvents()
        self._items = ItemEvents(self._numbered, call.output)
        self.form = StreamFormat(self.failure, b"response.failed", end=b"", headers=call.headers)

    def queued_events(self) -> Iterator[Event]:
        """The first events of a background response, which waits for its turn."""
        self._created = True
        response = self._call.response(QUEUED)
        yield self._numbered.event("response.created", response=response)
        yield self._numbered.event("response.queued", response=response)

    def events(self, deltas: list[RequestDelta]) -> Iterator[Event]:
        """The events that are due after these deltas."""
        if not self._begun:
            self._begun = True
            response = self._call.response(IN_PROGRESS)
            if not self._created:
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
        yield self._numbered.event(f"response.{LAST_EVENTS.get(status, status)}", response=self._call.response(status))

    def failure(self, error: RequestError) -> bytes:
        """The data of the last event of a stream that an error has ended."""
        self._call.stored = False
        self._call.fail(error)
        return self._numbered.event("response.failed", response=self._call.response(FAILED)).data
