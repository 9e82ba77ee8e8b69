"""The outermost middleware of every HTTP request: header limit, request id, access line, counters."""

import http
import logging
from collections.abc import MutableMapping
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from quartet.http_gateway.http.metrics import Metrics
from quartet.http_gateway.http.sse import SEND_PART
from quartet.http_gateway.routes.endpoint import ROUTE
from quartet.runtime.limits import MAX_HEADER_BYTES, MAX_RID_CHARS

access_log = logging.getLogger("http_gateway.access")

QUIET = {"/livez", "/readyz", "/ready", "/metrics"}  # asked every few seconds by machines
REQUEST_ID = b"x-request-id"
PHRASES = {status.value: status.phrase for status in http.HTTPStatus}


class RequestMiddleware:
    """Counts each request, logs it, repeats its id in the answer, and refuses a head that is too large."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._metrics.http_active.inc()
        try:
            await self._serve(scope, receive, send)
        finally:
            self._metrics.http_active.dec()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers) + len(scope["raw_path"])
        request_id = given_request_id(headers)

        async def observed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._note(scope, message["status"], request_id)
                if request_id:
                    message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id)]
            await send(message)

        scope[SEND_PART] = send
        app = self._app if size <= MAX_HEADER_BYTES else too_large
        await app(scope, receive, observed)

    def _note(self, scope: Scope, status: int, request_id: bytes) -> None:
        """Count the answer and write its access line."""
        endpoint, method = scope.get(ROUTE, "unmatched"), scope["method"]
        self._metrics.received(endpoint, method)
        self._metrics.answered(endpoint, status, method)
        level = logging.DEBUG if endpoint in QUIET else logging.INFO
        if access_log.isEnabledFor(level):
            access_log.log(level, "%s", access_line(scope, status, request_id))


def given_request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The id that the client has given its request, shortened; empty where it has given none."""
    return next((value for name, value in headers if name == REQUEST_ID), b"")[:MAX_RID_CHARS]


def access_line(scope: Scope, status: int, request_id: bytes) -> str:
    """Without the query string, which may hold what is nobody's business; a quote would end the request's part."""
    host, port = scope.get("client") or ("-", 0)
    path = scope["raw_path"].decode("latin-1").replace('"', "%22")
    known = f" request-id={request_id.decode('latin-1')}" if request_id else ""
    method, protocol = scope["method"], scope["http_version"]
    return f'INFO:     {host}:{port} - "{method} {path} HTTP/{protocol}" {status} {PHRASES.get(status, "")}{known}'


too_large = PlainTextResponse(
    f"The request head exceeds the limit of {MAX_HEADER_BYTES} bytes.", 431, {"Connection": "close"}
)
