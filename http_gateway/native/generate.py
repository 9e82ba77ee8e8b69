"""POST|PUT /generate and its Vertex form: the native API."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.generation import rounds
from quartet.http_gateway.generation.intake import Job
from quartet.http_gateway.generation.output import Output
from quartet.http_gateway.http.sse import EventStream, event
from quartet.http_gateway.native.generate_body import FIELDS, GenerateBody, check_batch, to_job
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, beside
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_generates
from quartet.runtime.errors import RequestError


class VertexBody(msgspec.Struct):
    """POST /vertex_generate: the fields of a body for each prompt, and sampling parameters for all."""

    instances: list[dict[str, Any]]
    parameters: dict[str, Any] | None = None


async def generate(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    received_at = time.monotonic()
    body = await bodies.read(http, GenerateBody)
    job, single = await beside(http, admit, gateway, http, body)
    outputs = [gateway.output(item.request, received_at) for item in job.requests]
    if body.stream:
        return EventStream(chunks(gateway, http, job, outputs, single))
    answers = await collect(gateway, http, job, outputs)
    return json_answer(answers[0] if single else listed(answers))


async def vertex_generate(gateway: Gateway, http: HTTPRequest) -> Response:
    received_at = time.monotonic()
    given = await bodies.read(http, VertexBody)
    check_batch(len(given.instances), "instances")
    given_names = {name for instance in given.instances for name in instance}
    bodies.refuse_misspelt(given_names, GenerateBody)
    names = given_names.intersection(FIELDS)
    fields = {name: [instance.get(name) for instance in given.instances] for name in names}
    body = msgspec.convert({**fields, "sampling_params": given.parameters}, GenerateBody)
    job, _ = await beside(http, admit, gateway, http, body)
    outputs = [gateway.output(item.request, received_at) for item in job.requests]
    return json_answer(b'{"predictions":' + listed(await collect(gateway, http, job, outputs)) + b"}")


def admit(gateway: Gateway, http: HTTPRequest, body: GenerateBody) -> tuple[Job, bool]:
    """The Job of a body, and whether one object answers it. Raises RequestError."""
    check_servable(gateway, http)
    return to_job(body, gateway.rules)


def check_servable(gateway: Gateway, http: HTTPRequest) -> None:
    """Refuse what no body could make right: a model that does not generate, a rank that is not there."""
    check_generates(gateway)
    rank = http.headers.get("x-data-parallel-rank")
    if rank not in (None, "", "0"):
        raise RequestError(f"X-Data-Parallel-Rank must be 0: there is one rank, got {rank}.")


def listed(answers: list[bytes]) -> bytes:
    return b"[" + b",".join(answers) + b"]"


def json_answer(content: bytes) -> Response:
    return Response(content, media_type="application/json")


async def collect(gateway: Gateway, http: HTTPRequest, job: Job, outputs: list[Output]) -> list[bytes]:
    """The answer of every request, once all have ended."""
    async with aclosing(rounds.run(gateway.ring, http, job)) as steps:
        async for mail in steps:
            for index, text in mail:
                outputs[index].add(text)
    return [output.answer() for output in outputs]


async def chunks(
    gateway: Gateway, http: HTTPRequest, job: Job, outputs: list[Output], single: bool
) -> AsyncGenerator[bytes, None]:
    """The events of a stream: for each request that has got on, a chunk when one is due."""
    intervals = [item.request.params.stream_interval or gateway.config.stream_interval for item in job.requests]
    async with aclosing(rounds.run(gateway.ring, http, job)) as steps:
        async for mail in steps:
            for index, text in mail:
                outputs[index].add(text)
            due = [index for index in dict.fromkeys(index for index, _ in mail) if outputs[index].due(intervals[index])]
            if due:
                yield b"".join(
                    event(outputs[index].answer() if single else outputs[index].answer(index)) for index in due
                )
            if gateway.config.incremental_streaming_output:
                for index in due:
                    outputs[index].forget()


ENDPOINTS = [
    Endpoint("/generate", generate, ("POST", "PUT"), body=GenerateBody),
    Endpoint("/vertex_generate", vertex_generate, ("POST",), body=VertexBody),
]
