"""The batches of an application: how their requests are carried out, and where its endpoints find them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import cast

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.types import ASGIApp

from quartet.http_gateway.batches.in_process import call
from quartet.http_gateway.batches.runner import BatchRunner
from quartet.http_gateway.http import errors
from quartet.http_gateway.routes.file_store import FileStore
from quartet.http_gateway.routes.gateway import Gateway, Phase
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import Kind, RequestError

log = logging.getLogger(__name__)

PRIORITY = 100  # below requests that say nothing of theirs, which have 0
SWEEP_EVERY_S = 600.0
WITHOUT_PRIORITY = ("/v1/embeddings", "/v1/responses")

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def runner_of(http: HTTPRequest) -> BatchRunner:
    """The batches of the application that serves this request."""
    return cast(BatchRunner, http.app.state.batches)


def make_runner(gateway: Gateway, endpoints: Mapping[str, ASGIApp]) -> BatchRunner:
    """The batches of a server. `endpoints`: by path, those that a batch may call."""

    async def execute(method: str, url: str, body: bytes) -> tuple[int, bytes]:
        try:
            return await call(endpoints[url], url, with_priority(gateway.config, url, body))
        except Exception as error:  # fails this request, as it would over HTTP, and not its batch
            log.error("A request of a batch has failed.", exc_info=error)
            failure = RequestError(f"Internal error: {type(error).__name__}", Kind.INTERNAL)
            return failure.kind.status, msgspec.json.encode(errors.described(failure))

    runner = BatchRunner(gateway.files, execute, lambda: gateway.phase is not Phase.STARTING)
    gateway.at_drain.append(runner.stop)
    return runner


def with_priority(config: ServerConfig, url: str, body: bytes) -> bytes:
    """A request of a batch gives way to others, where the server has priorities and the request says nothing of it."""
    if config.schedule_policy != "priority" or url in WITHOUT_PRIORITY:
        return body
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    if bytes(fields.get("priority", b"null")) != b"null":
        return body
    priority = PRIORITY if config.schedule_low_priority_values_first else -PRIORITY
    return msgspec.json.encode(fields | {"priority": priority})


def lifespan(runner: BatchRunner, store: FileStore) -> Lifespan:
    """Goes on with unfinished batches when the application starts, and removes files whose time is over."""

    @asynccontextmanager
    async def span(app: Starlette) -> AsyncIterator[None]:
        await runner.resume()
        sweeping = asyncio.create_task(sweep(store))
        try:
            yield
        finally:
            sweeping.cancel()
            runner.stop()

    return span


async def sweep(store: FileStore, every_s: float = SWEEP_EVERY_S) -> None:
    """Remove what has had its time, also where nobody asks for anything."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await store.run(store.drop_expired)
        except RequestError as error:
            log.error("%s", error)
