"""A row of the route table, and what stands around its handler: the key, the error shapes, the client that leaves."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from http_gateway import errors
from http_gateway.auth import Access, Keys
from http_gateway.flight import ClientGone
from http_gateway.gateway import Gateway
from http_gateway.visitors import SAFE_METHODS, Visitors, refusal
from runtime.errors import Kind, RequestError
from runtime.limits import MAX_BODY_BYTES

log = logging.getLogger(__name__)

ROUTE = "quartet.route"  # scope key: path of the route that matched, for counting

Handler = Callable[[Gateway, Request], Awaitable[ASGIApp]]


@dataclass(frozen=True)
class Endpoint:
    """One path of the API. Access is the user's unless said otherwise: a route that forgets to say is not open."""

    path: str
    handler: Handler
    methods: tuple[str, ...] = ("GET",)
    access: Access = Access.USER
    shape: errors.Shape = errors.native
    changes_state: bool = False  # with GET too
    body: Any = None  # type of the request body, for the API's description
    answer: Any = None  # and of what is answered


class Guarded:
    """An endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint, gateway: Gateway, keys: Keys, visitors: Visitors) -> None:
        self._endpoint = endpoint
        self._gateway = gateway
        self._keys = keys
        self._visitors = visitors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoint
        scope[ROUTE] = endpoint.path
        changes = endpoint.changes_state or scope["method"] not in SAFE_METHODS
        if changes and (page := self._visitors.foreign(scope["headers"])):
            await refusal(page)(scope, receive, send)
            return
        if not self._keys.allow(endpoint.access, scope["headers"]):
            await unauthorized(self._keys.wanted(endpoint.access))(scope, receive, send)
            return
        try:
            response = await endpoint.handler(self._gateway, Request(scope, receive, send))
            await response(scope, receive, send)
        except RequestError as error:
            await endpoint.shape(error)(scope, receive, send)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            await errors.schema(error)(scope, receive, send)
        except (ClientGone, ClientDisconnect):
            log.info("Request is disconnected from the client side. Aborted %s %s", scope["method"], endpoint.path)


def unauthorized(wanted: str) -> Response:
    """`wanted`: which key is missing, for people."""
    return errors.json_response({"error": "Unauthorized", "message": wanted}, 401, {"WWW-Authenticate": "Bearer"})


async def read_body(http: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The whole body. Raises RequestError (413, naming the limit) when it is longer.

    As much again is read and thrown away before that, so that a client still sending gets to see the answer.
    """
    too_large = RequestError(f"The request body exceeds the limit of {limit} bytes.", Kind.TOO_LARGE)
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > 2 * limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in http.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > 2 * limit:
            break
        else:
            parts.clear()
    if size > limit:
        raise too_large
    return b"".join(parts)


def require_json(http: Request) -> None:
    """The OpenAI endpoints insist on the content type."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("Unsupported Media Type: Only 'application/json' is allowed")
