"""POST|PUT /generate and its Vertex form: the native API."""

import time
from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.generation.intake import Job
from quartet.http_gateway.generation.run_group import collect_group, stream_group
from quartet.http_gateway.http.sse import Event, EventStream
from quartet.http_gateway.native.generate_body import FIELDS, GenerateBody, check_batch, to_job
from quartet.http_gateway.ring.request_group import RequestDelta
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, convert_body
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.tasks import check_generates
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Text


class GenerateCall:
    """One HTTP call: its requests, and what they have produced so far."""

    def __init__(self, gateway: Gateway, job: Job, single: bool, received_at: float) -> None:
        """`single`: one object answers the call, not a list of them."""
        default = gateway.config.stream_interval
        self._single = single
        self._outputs = [gateway.output(item.request, received_at) for item in job.requests]
        self._intervals = [item.request.params.stream_interval or default for item in job.requests]
        self._new_only = gateway.config.incremental_streaming_output

    def take(self, index: int, text: Text) -> None:
        self._outputs[index].add(text)

    def answers(self) -> list[bytes]:
        """The JSON of each request."""
        return [output.answer() for output in self._outputs]

    def events(self, deltas: list[RequestDelta]) -> Iterator[Event]:
        """The chunks that are due after these deltas, one for each request."""
        for index, text in deltas:
            self.take(index, text)
        for index in dict.fromkeys(index for index, _ in deltas):
            output = self._outputs[index]
            if output.due(self._intervals[index]):
                yield Event(output.answer() if self._single else output.answer(index))
                if self._new_only:
                    output.drop_sent()


class VertexBody(msgspec.Struct):
    """POST /vertex_generate: the fields of a body for each prompt, and sampling parameters for all."""

    instances: list[dict[str, Any]]
    parameters: dict[str, Any] | None = None


async def generate(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    """One answer object for each prompt and copy, whole or as a stream."""
    received_at = time.monotonic()
    body = await bodies.read_json_body(http, GenerateBody)
    job, single = await convert_body(http, admit, gateway, http, body)
    call = GenerateCall(gateway, job, single, received_at)
    if body.stream:
        return stream_group(gateway.ring, http, job, call.events)
    await collect_group(gateway.ring, http, job, call.take)
    answers = call.answers()
    return json_answer(answers[0] if single else json_array(answers))


async def vertex_generate(gateway: Gateway, http: HTTPRequest) -> Response:
    """One answer object for each instance, in the shape of Vertex AI."""
    received_at = time.monotonic()
    given = await bodies.read_json_body(http, VertexBody)
    check_batch(len(given.instances), "instances")
    given_names = {name for instance in given.instances for name in instance}
    if misplaced := sorted(given_names & GenerateBody.ELSEWHERE.keys()):
        raise RequestError(bodies.MISPLACED.format(misplaced[0], "parameters"), field=misplaced[0])
    for instance in given.instances:
        bodies.refuse_other_names(instance, GenerateBody)
    bodies.refuse_misspelt(given_names, GenerateBody)
    names = given_names.intersection(FIELDS)
    fields = {name: [instance.get(name) for instance in given.instances] for name in names}
    body = msgspec.convert({**fields, "sampling_params": given.parameters}, GenerateBody)
    job, _ = await convert_body(http, admit, gateway, http, body)
    call = GenerateCall(gateway, job, False, received_at)
    await collect_group(gateway.ring, http, job, call.take)
    return json_answer(b'{"predictions":' + json_array(call.answers()) + b"}")


def admit(gateway: Gateway, http: HTTPRequest, body: GenerateBody) -> tuple[Job, bool]:
    """The Job of a body, and whether one object answers it. Raises RequestError."""
    check_servable(gateway, http)
    return to_job(body, gateway.rules)


def check_servable(gateway: Gateway, http: HTTPRequest) -> None:
    """Refuse what no body could make right: a model that does not generate."""
    check_generates(gateway)


def json_array(answers: list[bytes]) -> bytes:
    return b"[" + b",".join(answers) + b"]"


def json_answer(content: bytes) -> Response:
    return Response(content, media_type="application/json")


ENDPOINTS = [
    Endpoint("/generate", generate, ("POST", "PUT"), body=GenerateBody),
    Endpoint("/vertex_generate", vertex_generate, ("POST",), body=VertexBody),
]
