"""The deployment that talks HTTP, before the replicas with the rings."""

import json
from collections.abc import AsyncIterator

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from deploy.ray.replica import Chunk
from deploy.ray.resume import resumed

UNAVAILABLE = 503


@serve.deployment(max_ongoing_requests=4096)
class Front:
    """POST /generate: one prompt, as the server's own /generate takes it."""

    def __init__(self, rings: DeploymentHandle) -> None:
        self.rings = rings.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError as error:
            return JSONResponse({"error": {"message": f"The body is no JSON: {error}", "code": 400}}, 400)
        chunks = resumed(self.rings.generate.remote, body, (RayActorError,))
        first = await anext(chunks)
        if "error" in first:
            return refusal(first)
        if body.get("stream"):
            return StreamingResponse(events(first, chunks), media_type="text/event-stream")
        last = first
        async for chunk in chunks:
            last = chunk
        return refusal(last) if "error" in last else JSONResponse(last)


def refusal(chunk: Chunk) -> Response:
    return JSONResponse(chunk, chunk["error"]["code"] or UNAVAILABLE)


async def events(first: Chunk, chunks: AsyncIterator[Chunk]) -> AsyncIterator[str]:
    """The server-sent events of a stream."""
    yield event(first)
    async for chunk in chunks:
        yield event(chunk)
    yield "data: [DONE]\n\n"


def event(chunk: Chunk) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
