"""POST /v1/completions: text behind a prompt, in OpenAI's shapes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.generation.run_group import collect_group, stream_group
from quartet.http_gateway.http import errors, sse
from quartet.http_gateway.http.sse import Event, EventStream
from quartet.http_gateway.native.generate import check_servable, json_answer
from quartet.http_gateway.native.generate_body import pack_prompt_ids, placeholder_request, thought_of
from quartet.http_gateway.openai.answers import Completion, CompletionChoice, Metadata, Usage
from quartet.http_gateway.openai.extras import Extras
from quartet.http_gateway.openai.output import Offsets, OutputState, completion_logprobs, usage
from quartet.http_gateway.openai.params import CLIENT_NAMES, DEFAULT_MODEL, budget_of, job_of, params_of
from quartet.http_gateway.openai.types import CompletionBody
from quartet.http_gateway.ring.request_group import RequestDelta
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body, require_json
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.token_questions import detokenize_ids
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, LogprobOptions, Text

DEFAULT_TOKENS = 16
EMPTY = "Prompt cannot be empty"
MIXED = "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids."
NO_SUFFIX = "suffix is not supported: this server does not fill in the middle."

_encode = msgspec.json.Encoder().encode


@dataclass
class Choice:
    """One choice on its way: its state, and the text that was not sent yet."""

    state: OutputState
    extras: Extras
    text: list[str] = field(default_factory=list)
    offsets: Offsets = field(default_factory=Offsets)

    def take(self, text: Text) -> None:
        self.state.take(text)
        self.extras.take(text)
        self.text.append(text.text)

    def next_choice(self, index: int, with_logprobs: bool) -> CompletionChoice:
        """What is new since the last time."""
        text, scored = "".join(self.text), self.state.scored()
        self.text.clear()
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=completion_logprobs(scored, self.offsets) if with_logprobs else None,
            finish_reason=self.state.finish_reason,
            matched_stop=self.state.matched_stop,
            **self.extras.take_new(),
            **(self.extras.end() if self.state.finish is not None else {}),
        )


class CompletionCall:
    """One HTTP call: what it asks for, and what its choices have become."""

    def __init__(self, gateway: Gateway, body: CompletionBody) -> None:
        refuse_suffix(body)
        prompts, single = read_prompts(body, gateway.rules.vocab_size)
        limit = {} if body.max_tokens is None else {"max_new_tokens": body.max_tokens}
        if (budget := budget_of(body)) is not None:
            limit["thinking_budget"] = budget
        params = params_of(gateway, body, limit, {"max_new_tokens": DEFAULT_TOKENS})
        thought = thought_of(False, params, gateway.rules)
        self.body = body
        self.gateway = gateway
        self.prompts = prompts
        self.copies = params.n
        self.logprobs = logprob_options(body)
        self.id, self.job = job_of(gateway, body, prompts, single, params, self.logprobs)
        for item in self.job.requests:
            item.request.thought = thought
        received_at = time.monotonic()
        self.choices = [
            Choice(OutputState(self.logprobs), Extras(gateway, body, item.request, received_at))
            for item in self.job.requests
        ]
        self.created = int(time.time())

    def usage(self) -> Usage:
        states = [choice.state for choice in self.choices]
        return usage(states, self.copies, cache_report=self.gateway.config.enable_cache_report)

    def completion(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        model = self.body.model or DEFAULT_MODEL
        return Completion(id=self.id, created=self.created, model=model, choices=choices, **more)

    def next_choice(self, index: int) -> CompletionChoice:
        return self.choices[index].next_choice(index, self.logprobs is not None)

    def echo(self, texts: Sequence[str]) -> None:
        """Put each prompt before the output of its choices."""
        for index, choice in enumerate(self.choices):
            prompt = texts[index // self.copies]
            choice.text.append(prompt)
            choice.offsets = Offsets(prompt)

    def take(self, index: int, text: Text) -> None:
        self.choices[index].take(text)

    def events(self, deltas: list[RequestDelta]) -> list[Event]:
        """The chunks of a stream that are due after these deltas."""
        for index, text in deltas:
            self.take(index, text)
        interval = self.gateway.config.stream_interval
        due = [i for i in dict.fromkeys(index for index, _ in deltas) if self.choices[i].state.due(interval)]
        choices = [self.next_choice(index) for index in due]
        running = self.usage() if wants(self.body, "continuous_usage_stats") else None
        chunks = [self.completion([choice], usage=running) for choice in choices if says_something(choice)]
        return [Event(_encode(chunk)) for chunk in chunks]

    def last_events(self) -> Iterator[Event]:
        """The usage of all choices, where it was asked for."""
        if wants(self.body, "include_usage"):
            yield Event(_encode(self.completion([], usage=self.usage())))

    def answer(self) -> Completion:
        """The whole answer, once all requests have ended."""
        choices = [self.next_choice(index) for index in range(len(self.choices))]
        version = self.choices[0].state.weight_version or self.gateway.weight_version
        return self.completion(choices, usage=self.usage(), metadata=Metadata(version))


async def completions(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    """Text behind one prompt or many."""
    require_json(http)
    body = await bodies.read_json_body(http, CompletionBody)
    check_servable(gateway, http)
    call = await convert_body(http, CompletionCall, gateway, body)
    if body.echo:
        call.echo(await prompt_texts(gateway, call.prompts))
    if body.stream:
        return stream_group(gateway.ring, http, call.job, call.events, call.last_events, sse.OPENAI)
    await collect_group(gateway.ring, http, call.job, call.take)
    return json_answer(_encode(call.answer()))


def says_something(choice: CompletionChoice) -> bool:
    """A step whose text is held back, because it may yet become a stop, is not worth a chunk."""
    return bool(choice.text or choice.finish_reason or choice.logprobs or choice.token_ids or choice.prompt_token_ids)


def wants(body: Any, option: str) -> bool:
    return bool(body.stream_options and getattr(body.stream_options, option))


def refuse_suffix(body: CompletionBody) -> None:
    if body.suffix:
        raise RequestError(NO_SUFFIX, field="suffix")


def logprob_options(body: CompletionBody) -> LogprobOptions | None:
    """`true` is what some clients send for: of the token itself."""
    if body.logprobs is None or body.logprobs is False:
        return None
    top = 0 if body.logprobs is True else body.logprobs
    return LogprobOptions(start=0 if body.echo else -1, top=top, text=True)


def read_prompts(body: CompletionBody, vocab_size: int) -> tuple[list[Generate], bool]:
    """One Generate per prompt, and whether it is only one. Raises RequestError."""
    given: Any = body.prompt
    if not given:
        raise RequestError(EMPTY, field="prompt")
    single = isinstance(given, str) or isinstance(given[0], int)
    items = [given] if single else given
    kind = str if isinstance(items[0], str) else list
    if not all(isinstance(item, kind) for item in items) or (
        kind is list and not all(isinstance(token, int) for item in items for token in item)
    ):
        raise RequestError(MIXED, field="prompt")
    if not all(items):
        raise RequestError(EMPTY, field="prompt")
    if kind is str:
        return [Generate(request=placeholder_request(), text=item) for item in items], single
    return [
        Generate(request=placeholder_request(), input_ids=pack_prompt_ids(item, vocab_size)) for item in items
    ], single


async def prompt_texts(gateway: Gateway, prompts: list[Generate]) -> list[str]:
    """The text of each prompt, to be echoed: without the start of a character that the output will complete."""
    if prompts[0].text is not None:
        return [prompt.text or "" for prompt in prompts]
    return await detokenize_ids(gateway, [prompt.input_ids for prompt in prompts], open_end=True)


SHAPE = errors.with_client_names(
    errors.openai, {**CLIENT_NAMES, "top_logprobs_num": "logprobs", "input_ids": "prompt", "text": "prompt"}
)
ENDPOINTS = [Endpoint("/v1/completions", completions, ("POST",), shape=SHAPE, body=CompletionBody, answer=Completion)]
