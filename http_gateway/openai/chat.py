"""POST /v1/chat/completions: the next turn of a conversation, in OpenAI's shapes."""

import time
from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.generation.run_group import collect_group, stream_group
from quartet.http_gateway.http import errors, sse
from quartet.http_gateway.http.sse import Event, EventStream
from quartet.http_gateway.native.generate import check_servable, json_answer
from quartet.http_gateway.openai.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    Metadata,
    Usage,
)
from quartet.http_gateway.openai.chat_body import (
    chat_params,
    choosing,
    logprob_options,
    make_turn,
    prompt_of,
    thought_of,
)
from quartet.http_gateway.openai.chat_turn import Turn, merged, message_of
from quartet.http_gateway.openai.completions import wants
from quartet.http_gateway.openai.extras import Extras
from quartet.http_gateway.openai.output import OutputState, chat_logprobs, usage
from quartet.http_gateway.openai.params import CLIENT_NAMES, DEFAULT_MODEL, job_of
from quartet.http_gateway.openai.types import ChatBody
from quartet.http_gateway.ring.request_group import RequestDelta
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.messages import Text

_encode = msgspec.json.Encoder().encode


class Choice:
    """One choice on its way."""

    def __init__(self, state: OutputState, turn: Turn, with_logprobs: bool, extras: Extras) -> None:
        self.state = state
        self.extras = extras
        self._turn = turn
        self._with_logprobs = with_logprobs
        self._unsent: list[Delta] = []
        self._opened = False

    def take(self, text: Text) -> None:
        self.state.take(text)
        self.extras.take(text)
        if text.place is not None:
            self._turn.begin(text.place)
        self._unsent += self._turn.read(text.text, self.state.finish is not None)
        if self._turn.thinking:
            self.state.reasoning_tokens = self.state.completion_tokens

    @property
    def cut_by_stop(self) -> bool:
        """A stop string has broken a call off."""
        return self._turn.cut and isinstance(self.state.matched_stop, str)

    @property
    def finish_reason(self) -> str | None:
        reason = self.state.finish_reason
        return "tool_calls" if reason == "stop" and self._turn.called and not self.cut_by_stop else reason

    def whole(self, index: int) -> ChatChoice:
        """The choice of an answer that is not streamed."""
        return ChatChoice(
            index=index,
            message=message_of(self._unsent),
            logprobs=self._logprobs(),
            finish_reason=self.finish_reason,
            matched_stop=self.state.matched_stop,
            **self.extras.take_new(),
            **self.extras.end(),
        )

    def next_chunks(self, index: int) -> Iterator[ChatChunkChoice]:
        """What is new since the last time: the role first, the reason of the end last, in chunks of their own."""
        if not self._opened:
            self._opened = True
            yield ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))
        deltas, logprobs, extra = merged(self._unsent), self._logprobs(), self.extras.take_new()
        self._unsent = []
        if not deltas and (extra or (logprobs and logprobs.content)):
            deltas = [Delta(content="")]  # tokens without text, or whose text is held back
        for delta in deltas:
            yield ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, **extra)
            logprobs, extra = None, {}
        if self.state.finish is not None:
            yield from self._end(index)

    def _end(self, index: int) -> Iterator[ChatChunkChoice]:
        extra = self.extras.end()
        hidden = extra.pop("hidden_states", None)
        yield ChatChunkChoice(
            index=index,
            delta=Delta(),
            finish_reason=self.finish_reason,
            matched_stop=self.state.matched_stop,
            **extra,
        )
        if hidden is not None:
            yield ChatChunkChoice(index=index, delta=Delta(hidden_states=hidden))

    def _logprobs(self) -> ChatLogprobs | None:
        scored = self.state.scored()
        return chat_logprobs(scored) if self._with_logprobs else None


class ChatCall:
    """One HTTP call: what it asks for, and what its choices have become."""

    def __init__(self, gateway: Gateway, body: ChatBody) -> None:
        config = gateway.config
        choice = choosing(body, config.tool_call_parser)
        params = chat_params(gateway, body, choice)
        options = logprob_options(body)
        prompt = prompt_of(body, choice, gateway.rules.vocab_size)
        self.id, self.job = job_of(gateway, body, [prompt], True, params, options)
        thought = thought_of(body, config.reasoning_parser, params)
        for request in self.job.requests:
            request.request.thought = thought
        self.body = body
        self.gateway = gateway
        received_at = time.monotonic()
        self.choices = [
            Choice(
                OutputState(options),
                make_turn(body, choice, config.reasoning_parser, thought),
                options is not None,
                Extras(gateway, body, item.request, received_at),
            )
            for item in self.job.requests
        ]
        self._head: dict[str, Any] = {
            "id": self.id,
            "created": int(time.time()),
            "model": body.model or DEFAULT_MODEL,
        }

    def usage(self) -> Usage:
        states = [choice.state for choice in self.choices]
        return usage(states, len(states), cache_report=self.gateway.config.enable_cache_report)

    def answer(self) -> ChatCompletion:
        version = self.choices[0].state.weight_version or self.gateway.weight_version
        choices = [choice.whole(index) for index, choice in enumerate(self.choices)]
        return ChatCompletion(**self._head, choices=choices, usage=self.usage(), metadata=Metadata(version))

    def take(self, index: int, text: Text) -> None:
        self.choices[index].take(text)

    def events(self, deltas: list[RequestDelta]) -> Iterator[Event]:
        """The events of a stream that are due after these deltas."""
        return (Event(_encode(chunk)) for chunk in self.chunks(deltas))

    def chunks(self, deltas: list[RequestDelta]) -> Iterator[ChatChunk]:
        """The chunks that are due after these deltas."""
        for index, text in deltas:
            self.take(index, text)
        running = self.usage() if wants(self.body, "continuous_usage_stats") else None
        for index in dict.fromkeys(index for index, _ in deltas):
            if self.choices[index].state.due(self.gateway.config.stream_interval):
                for choice in self.choices[index].next_chunks(index):
                    yield ChatChunk(**self._head, choices=[choice], usage=running)

    def last_events(self) -> Iterator[Event]:
        """The usage of all choices, where it was asked for."""
        if wants(self.body, "include_usage"):
            yield Event(_encode(ChatChunk(**self._head, choices=[], usage=self.usage())))


async def chat_completions(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    """The next turn of a conversation."""
    require_json(http)
    body = await bodies.read_json_body(http, ChatBody)
    check_servable(gateway, http)
    call = await convert_body(http, ChatCall, gateway, body)
    if body.stream:
        return stream_group(gateway.ring, http, call.job, call.events, call.last_events, sse.OPENAI)
    await collect_group(gateway.ring, http, call.job, call.take)
    return json_answer(_encode(call.answer()))


SHAPE = errors.with_client_names(
    errors.openai, {**CLIENT_NAMES, "top_logprobs_num": "top_logprobs", "text": "messages", "prompt": "messages"}
)
ENDPOINTS = [
    Endpoint("/v1/chat/completions", chat_completions, ("POST",), shape=SHAPE, body=ChatBody, answer=ChatCompletion)
]
