"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API. A message is a chat completion in other shapes."""

from collections.abc import Iterator

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.anthropic import error_responses
from quartet.http_gateway.anthropic.content import ContentBlocks, named_event
from quartet.http_gateway.anthropic.conversation import chat_body, conversation
from quartet.http_gateway.anthropic.types import (
    ConversationBody,
    ErrorAnswer,
    Message,
    MessagesBody,
    MessageUsage,
    StopReason,
    ThinkingTokens,
    TokenCount,
)
from quartet.http_gateway.generation.run_group import collect_group, stream_group
from quartet.http_gateway.http import errors
from quartet.http_gateway.http.sse import Event, EventStream
from quartet.http_gateway.native.generate import check_servable
from quartet.http_gateway.openai.chat import ChatCall
from quartet.http_gateway.openai.params import DEFAULT_MODEL
from quartet.http_gateway.openai.tokens import ids_of_chat
from quartet.http_gateway.ring.request_group import RequestDelta
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway, Phase
from quartet.runtime.errors import Kind, RequestError

REASONS: dict[str | None, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
ABORTED = "The request was aborted."


def aborted(draining: bool) -> RequestError:
    """Why a message has no end. The API has no stop reason for it.

    Who aborts a request does not want it: the clients of this API try again after 408, 409, 429 and 5xx, so it is a
    400. Only a server that shuts down wants its clients to try again, elsewhere.
    """
    return RequestError(ABORTED, Kind.UNAVAILABLE if draining else Kind.BAD_REQUEST)


class MessageCall:
    """One call of POST /v1/messages: the chat completion, and the message that it has become so far."""

    def __init__(self, gateway: Gateway, body: MessagesBody) -> None:
        self._body = body
        self._gateway = gateway
        chat = chat_body(body, thinks=gateway.config.reasoning_parser is not None)
        chat.max_tokens = min(body.max_tokens, gateway.facts.context_length)
        self.chat = ChatCall(gateway, chat)
        [self._choice] = self.chat.choices
        for item in self.chat.job.requests:
            item.request.clips_output = True  # the API has a reason for an output that the context has ended
            if (thought := item.request.thought) is not None:  # agents send a budget to every model
                item.request.thought = msgspec.structs.replace(thought, limited=False)
        self._id = self.chat.id
        omitted = body.thinking is not None and body.thinking.display == "omitted"
        self._blocks = ContentBlocks(self._id, include_thinking=not omitted)
        self._started = False  # the stream

    def message(self) -> Message:
        """The whole message, when the call has taken all deliveries."""
        for choice in self._choice.next_chunks(0):
            for _ in self._blocks.take(choice.delta):
                pass
        message = self._start()
        message.content = self._blocks.content()
        message.stop_reason, message.stop_sequence = self._stop_reason()
        return message

    def events(self, deltas: list[RequestDelta]) -> Iterator[Event]:
        """The events of a stream that are due after these deltas."""
        chunks = list(self.chat.chunks(deltas))
        if not self._started:  # it counts the prompt's tokens, which are known from the first delta on
            self._started = True
            yield named_event("message_start", message=self._start())
            yield error_responses.PING
        for chunk in chunks:
            for choice in chunk.choices:
                yield from self._blocks.take(choice.delta)

    def last_events(self) -> Iterator[Event]:
        """The events at the end of a stream. Raises RequestError where the request was aborted."""
        reason, sequence = self._stop_reason()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield from self._blocks.stop()
        yield named_event("message_delta", delta=delta, usage=self._usage())
        yield named_event("message_stop")

    def _start(self) -> Message:
        return Message(id=self._id, model=self._body.model or DEFAULT_MODEL, content=[], usage=self._usage())

    def _usage(self) -> MessageUsage:
        state = self._choice.state
        return MessageUsage(
            input_tokens=state.prompt_tokens - state.cached_tokens,
            cache_read_input_tokens=state.cached_tokens,
            output_tokens=state.completion_tokens,
            output_tokens_details=ThinkingTokens(state.reasoning_tokens),
        )

    def _stop_reason(self) -> tuple[StopReason, str | None]:
        """The reason, and the stop sequence that was generated. Raises RequestError where the request was aborted."""
        state = self._choice.state
        if isinstance(state.matched_stop, str) and state.matched_stop in (self._body.stop_sequences or ()):
            return "stop_sequence", state.matched_stop
        reason = REASONS.get(self._choice.finish_reason)
        if reason is None:
            raise aborted(self._gateway.phase is Phase.DRAINING)
        if reason == "max_tokens" and state.completion_tokens < self._body.max_tokens:
            return "model_context_window_exceeded", None
        return reason, None


async def messages(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    """The next turn of a conversation, in the shapes of Anthropic's Messages API."""
    require_json(http)
    body = await bodies.read_json_body(http, MessagesBody)
    check_servable(gateway, http)
    call = await convert_body(http, MessageCall, gateway, body)
    if body.stream:
        form = error_responses.stream_format(http.scope)
        return stream_group(gateway.ring, http, call.chat.job, call.events, call.last_events, form)
    await collect_group(gateway.ring, http, call.chat.job, call.chat.take)
    return errors.json_response(call.message(), headers=error_responses.headers(http.scope))


async def count_tokens(gateway: Gateway, http: HTTPRequest) -> Response:
    """The number of tokens in the prompt of such a turn."""
    require_json(http)
    body = await bodies.read_json_body(http, ConversationBody)
    check_servable(gateway, http)
    chat = await convert_body(http, conversation, body)
    count = TokenCount(len(await ids_of_chat(gateway, http, chat)))
    return errors.json_response(count, headers=error_responses.headers(http.scope))


ENDPOINTS = [
    Endpoint(
        "/v1/messages",
        messages,
        ("POST",),
        own_shape=error_responses.shape,
        body=MessagesBody,
        answer=Message,
        failure=ErrorAnswer,
    ),
    Endpoint(
        "/v1/messages/count_tokens",
        count_tokens,
        ("POST",),
        own_shape=error_responses.shape,
        body=ConversationBody,
        answer=TokenCount,
        failure=ErrorAnswer,
    ),
]
