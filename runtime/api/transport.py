"""How an `Engine` talks to its processes: HTTP over a Unix socket that only this user can reach.

Each call has a connection of its own, which costs no more than a request on one that is kept, and is closed when the
call is left: by its end, an exception, a cancelled task. That aborts the request.
"""

import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from quartet.runtime.api.calls import Call
from quartet.runtime.client.connection import error_message
from quartet.runtime.client.events import EventReader

FIELD_HEADER = "x-error-field"  # of an answer: the field of the request that is wrong
BASE_URL = "http://localhost"


class EngineError(Exception):
    """A request was refused or has failed.

    `message`: the server's. `field`: the name of the field that is wrong, where one is. `status`: HTTP's; 0 where the
    engine has ended.
    """

    def __init__(self, message: str, status: int = 0, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.field = field


class StreamError(msgspec.Struct):
    """An error amid a stream, in the shape of either API."""

    message: str
    code: int | str | None = None
    param: str | None = None


class StreamEvent(msgspec.Struct):
    error: StreamError | None = None


class Transport:
    """Runs calls."""

    def __init__(self, socket: Path, explain: Callable[[], str]) -> None:
        """`explain`: why nobody answers, for people."""
        self._socket = str(socket)
        self._explain = explain
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used; without it httpx reads certificates each time

    def run(self, call: Call) -> Any:
        """The answer. Raises EngineError."""
        with self._errors(), self._client() as client:
            return read(call, client.send(request(client, call)))

    def stream(self, call: Call) -> Iterator[Any]:
        """The events of the answer. Raises EngineError."""
        with self._errors(), self._client() as client:
            response = client.send(request(client, call), stream=True)
            try:
                if response.is_error:
                    response.read()
                    check(response)
                events = EventReader()
                for piece in response.iter_bytes():
                    yield from map(event, events.feed(piece))
            finally:
                response.close()

    async def async_run(self, call: Call) -> Any:
        """The answer. Raises EngineError."""
        with self._errors():
            async with self._async_client() as client:
                return read(call, await client.send(request(client, call)))

    async def async_stream(self, call: Call) -> AsyncIterator[Any]:
        """The events of the answer. Raises EngineError."""
        with self._errors():
            async with self._async_client() as client:
                response = await client.send(request(client, call), stream=True)
                try:
                    if response.is_error:
                        await response.aread()
                        check(response)
                    events = EventReader()
                    async for piece in response.aiter_bytes():
                        for data in events.feed(piece):
                            yield event(data)
                finally:
                    await response.aclose()

    @contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=self._socket, verify=self._tls), base_url=BASE_URL, timeout=None
        ) as client:
            yield client

    @asynccontextmanager
    async def _async_client(self) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=self._socket, verify=self._tls), base_url=BASE_URL, timeout=None
        ) as client:
            yield client

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise EngineError(self._explain()) from error


def request(client: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
    """A request without headers that nobody reads.

    Raises TypeError and ValueError for what JSON cannot hold, such as bytes and NaN.
    """
    if call.body is None:
        return client.build_request("GET", call.path)
    content = json.dumps(call.body, allow_nan=False, default=plain_object).encode()
    return client.build_request("POST", call.path, content=content, headers={"Content-Type": "application/json"})


def plain_object(value: object) -> object:
    """What JSON makes of a mapping that is no dict."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is nothing that JSON can hold")


def read(call: Call, response: httpx.Response) -> Any:
    """What the method of a call returns. Raises EngineError."""
    check(response)
    if call.is_text:
        return call.read(response.text)
    return call.read(msgspec.json.decode(response.content) if response.content else None)


def check(response: httpx.Response) -> None:
    """Raise EngineError for an answer that is none."""
    if response.is_error:
        message = error_message(response.content) or f"HTTP {response.status_code}"
        raise EngineError(message, response.status_code, response.headers.get(FIELD_HEADER))


def event(data: bytes) -> Any:
    """An event of a stream. Raises EngineError where it says that the request has failed."""
    decoded = msgspec.json.decode(data)
    if isinstance(decoded, dict) and "error" in decoded:
        error = msgspec.convert(decoded, StreamEvent).error
        if error is not None:
            raise EngineError(error.message, error.code if isinstance(error.code, int) else 500, error.param)
    return decoded
