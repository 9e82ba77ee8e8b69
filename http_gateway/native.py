"""POST|PUT /generate and its Vertex form: the native API."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from http_gateway import rounds
from http_gateway.endpoint import Endpoint, read_body
from http_gateway.gateway import Gateway
from http_gateway.generate_body import GenerateBody, to_job
from http_gateway.intake import Job
from http_gateway.output import Output
from http_gateway.sse import EventStream, event
from runtime.errors import RequestError

NOT_GENERATIVE = "This model serves embeddings and does not generate; use /encode."


class VertexBody(msgspec.Struct):
    """POST /vertex_generate."""

    instances: list[dict[str, msgspec.Raw]]
    parameters: msgspec.Raw = msgspec.Raw(b"null")


async def generate(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    received_at = time.monotonic()
    body = msgspec.json.decode(await read_body(http), type=GenerateBody)
    if gateway.model.is_embedding:
        raise RequestError(NOT_GENERATIVE)
    header_rank = http.headers.get("x-data-parallel-rank")
    if header_rank not in (None, "", "0"):
        raise RequestError(f"X-Data-Parallel-Rank must be 0: there is one rank, got {header_rank}.")
    job, single = to_job(body, gateway.rules)
    outputs = [gateway.output(item.request, received_at) for item in job.requests]
    if body.stream:
        return EventStream(chunks(gateway, http, job, outputs, single))
    answers = await collect(gateway, http, job, outputs)
    return Response(answers[0] if single else b"[" + b",".join(answers) + b"]", media_type="application/json")


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


ENDPOINTS = [Endpoint("/generate", generate, ("POST", "PUT"))]
