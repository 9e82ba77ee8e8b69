"""A row of the route table, and what surrounds its handler: keys, error shapes, the client that leaves."""

import asyncio
import logging
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quartet.http_gateway.http import errors
from quartet.http_gateway.http.allowed_sites import SAFE_METHODS, AllowedSites, of_foreign_page, refusal
from quartet.http_gateway.http.auth import Access, Keys
from quartet.http_gateway.http.counting import ValueCounter
from quartet.http_gateway.ring.request_group import ClientGone
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import (
    BODY_BYTES_PER_MEMBER,
    MAX_ADAPTER_BODY_VALUES,
    MAX_BODY_VALUES,
    MAX_CONTROL_BODY_VALUES,
)
from quartet.runtime.shorten import short

log = logging.getLogger(__name__)

ROUTE = "quartet.route"  # scope key: path of the route that matched, for counting
BOUNDS = "quartet.bounds"  # scope key: Bounds of the request's body

SIZE = "quartet.size"  # scope key: bytes of the body that was read
LARGE_BODY = 1 << 18  # larger ones are converted in a thread

MAX_LENGTH_DIGITS = 20  # of a Content-Length that is read as a number

Made = TypeVar("Made")
Handler = Callable[[Gateway, Request], Awaitable[ASGIApp]]


@dataclass(frozen=True)
class Bounds:
    """What a request's body may hold."""

    size: int  # bytes
    flag: str  # that says so; "" where none does
    values: int

    @property
    def members(self) -> int:
        """Of lists and objects, numbers for example."""
        return self.size // BODY_BYTES_PER_MEMBER

    def check_size(self, size: int, counter: ValueCounter) -> None:
        """Raise RequestError (413, naming the limit) for a body that has so much already."""
        if size > self.size:
            by = f" ({self.flag})" if self.flag else ""
            raise RequestError(f"The request body exceeds the limit of {self.size} bytes{by}.", Kind.TOO_LARGE)
        if counter.commas > self.members:
            raise RequestError(
                f"The request body holds more than {self.members} numbers and other members of lists (one for each "
                f"{BODY_BYTES_PER_MEMBER} bytes of its limit); send it as several requests.",
                Kind.TOO_LARGE,
            )
        if counter.values > self.values:
            raise RequestError(
                f"The request body holds more than {self.values} strings, lists and objects; "
                "send it as several requests.",
                Kind.TOO_LARGE,
            )


def of_requests(config: ServerConfig) -> Bounds:
    return Bounds(config.max_body_size, "--max-body-size", MAX_BODY_VALUES)


def of_commands(config: ServerConfig) -> Bounds:
    return Bounds(config.max_body_size, "--max-body-size", MAX_CONTROL_BODY_VALUES)


def of_weights(config: ServerConfig) -> Bounds:
    return Bounds(config.max_weight_body_size, "--max-weight-body-size", MAX_CONTROL_BODY_VALUES)


def of_adapters(config: ServerConfig) -> Bounds:
    return Bounds(config.max_weight_body_size, "--max-weight-body-size", MAX_ADAPTER_BODY_VALUES)


def no_own_shape(scope: Scope) -> errors.Shape | None:
    """Most routes tell a missing key, a foreign page and a broken body in the shapes that they share."""
    return None


@dataclass(frozen=True)
class Endpoint:
    """One path of the API. Access is the user's unless said otherwise: a route that forgets to say is not open.

    `shape`: of the errors that the handler raises. `own_shape`: of every error of a request, those before the handler
    included, in an API that has one shape for all.
    """

    path: str
    handler: Handler
    methods: tuple[str, ...] = ("GET",)
    access: Access = Access.USER
    shape: errors.Shape = errors.native
    own_shape: Callable[[Scope], errors.Shape | None] = no_own_shape
    changes_state: bool = False  # with GET too
    body: Any = None  # type of the request body, for the API's description
    answer: Any = None  # and of what is answered
    failure: Any = None  # and of errors, where the API has its own
    bounds: Callable[[ServerConfig], Bounds] = of_requests


class Guarded:
    """An endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint, gateway: Gateway, keys: Keys, allowed_sites: AllowedSites) -> None:
        self._endpoint = endpoint
        self._gateway = gateway
        self._keys = keys
        self._allowed_sites = allowed_sites

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoint
        scope[ROUTE] = endpoint.path
        scope[BOUNDS] = endpoint.bounds(self._gateway.config)
        own = endpoint.own_shape(scope)
        changes = endpoint.changes_state or scope["method"] not in SAFE_METHODS
        if changes and (page := self._allowed_sites.foreign_page(scope["headers"])):
            await (own(of_foreign_page(page)) if own else refusal(page))(scope, receive, send)
            return
        if not self._keys.allow(endpoint.access, scope["headers"]):
            await unauthorized(self._keys.required_key(endpoint.access, scope["headers"]), own)(scope, receive, send)
            return
        try:
            response = await endpoint.handler(self._gateway, Request(scope, receive, send))
            await response(scope, receive, send)
        except RequestError as error:
            await (own or endpoint.shape)(error)(scope, receive, send)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            await (own(errors.of_schema(error)) if own else errors.schema(error))(scope, receive, send)
        except (ClientGone, ClientDisconnect):
            log.info("Request is disconnected from the client side. Aborted %s %s", scope["method"], endpoint.path)


def unauthorized(message: str, own_shape: errors.Shape | None = None) -> Response:
    """401; the message says which key is missing."""
    if own_shape is not None:
        return own_shape(RequestError(message, Kind.UNAUTHORIZED))
    return errors.json_response({"error": "Unauthorized", "message": message}, 401, {"WWW-Authenticate": "Bearer"})


async def read_body(http: Request, size: int | None = None) -> bytes:
    """The whole body, without the byte order mark that some clients put before their JSON.

    Raises RequestError (413, naming the limit) when it is beyond the route's limits or `size`.
    """
    return b"".join([part async for part in body_parts(http, size)]).removeprefix(BOM_UTF8)


async def body_parts(http: Request, size: int | None = None) -> AsyncIterator[bytes]:
    """The body as it arrives, counted. Raises RequestError (413) as soon as it is too much.

    As much as the limit again is read and thrown away before the refusal, so that a client still sending gets to see
    the answer.
    """
    require_plain(http)
    bounds: Bounds = http.scope[BOUNDS]
    if size is not None and size < bounds.size:
        bounds = Bounds(size, "", bounds.values)
    counter, received = ValueCounter(), 0
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < MAX_LENGTH_DIGITS and int(declared) > 2 * bounds.size:
        bounds.check_size(int(declared), counter)
    refusal: RequestError | None = None
    async for part in http.stream():
        received += len(part)
        if refusal is None:
            counter.feed(part)
            try:
                bounds.check_size(received, counter)
            except RequestError as error:
                refusal = error
            else:
                yield part
        if received > 2 * bounds.size:
            break
    if refusal is not None:
        raise refusal
    http.scope[SIZE] = received


async def convert_body(http: Request, make: Callable[..., Made], *given: Any) -> Made:
    """`make(*given)`, which converts the body that was read; in a thread where the body is large."""
    if http.scope.get(SIZE, 0) < LARGE_BODY:
        return make(*given)
    return await asyncio.to_thread(make, *given)


def require_plain(http: Request) -> None:
    """Raise RequestError for a body that is compressed: it would be taken for what it is not."""
    encoding = http.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(f"Content-Encoding: {short(encoding)!r} is not supported; send the body as it is.")


def require_json(http: Request) -> None:
    """The OpenAI endpoints insist on the content type."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            "Unsupported Media Type: Only 'application/json' is allowed; send the header Content-Type: application/json"
        )
