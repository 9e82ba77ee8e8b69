"""The outermost middleware of every HTTP request: header limit, request id, access line, counters, record of the call.

Orchestrators ask some routes every few seconds. Their lines are left out of the access log, unless --log-level-http is
debug; an answer of a health check is logged when it is another one than the last. The same holds for what the page at /
asks by itself.
"""

import http
import logging
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from quartet.http_gateway.http.allowed_sites import SAFE_METHODS
from quartet.http_gateway.http.call_record import CALL, CallRecord, Tracer
from quartet.http_gateway.http.metrics import Metrics
from quartet.http_gateway.http.sse import SEND_PART
from quartet.http_gateway.routes.endpoint import ROUTE
from quartet.runtime.limits import MAX_HEADER_BYTES, MAX_RID_CHARS

access_log = logging.getLogger("http_gateway.access")

QUIET = {"/livez", "/readyz", "/ready", "/ping", "/metrics"}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # that are counted by name
OF_THE_PAGE = {"/server_info", "/page/{name}"}  # the page at / asks by itself; refusals are logged
HEALTH_CHECKS = {"/health", "/healthz", "/health_generate"}
REQUEST_ID = b"x-request-id"
PHRASES = {status.value: status.phrase for status in http.HTTPStatus}


class RequestMiddleware:
    """Counts each request, logs it, repeats its id in the answer, and refuses a head that is too large."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        observers: Sequence[Callable[[CallRecord], None]] = (),
        keeps_text: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        """`observers` and the `tracer` get the record of each call that may change or compute something, at its end.

        `keeps_text`: with the beginnings of its prompts and outputs.
        """
        self._app = app
        self._metrics = metrics
        self._observers = observers
        self._keeps_text = keeps_text
        self._tracer = tracer
        self._last_health: dict[str, int] = {}  # status of each health check's last answer

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
        record = self._record(scope, request_id)
        try:
            await app(scope, receive, observed)
        finally:
            if record is not None:
                record.route = scope.get(ROUTE, "unmatched")
                if not record.goes_on:
                    record.end()

    def _record(self, scope: Scope, request_id: bytes) -> CallRecord | None:
        """The record of a call, which goes with its scope; None where nobody wants one."""
        if scope["method"] in SAFE_METHODS:
            return None
        trace = self._tracer.begin(scope["headers"]) if self._tracer is not None else None
        if not self._observers and trace is None:
            return None
        record = scope[CALL] = CallRecord(self._observe, self._keeps_text)
        record.trace = trace
        record.method, record.request_id = scope["method"], request_id.decode("latin-1")
        return record

    def _observe(self, record: CallRecord) -> None:
        for observer in self._observers:
            observer(record)
        if self._tracer is not None and record.trace is not None:
            self._tracer.end(record)

    def _note(self, scope: Scope, status: int, request_id: bytes) -> None:
        """Count the answer and write its access line."""
        endpoint = scope.get(ROUTE, "unmatched")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.received(endpoint, method)
        self._metrics.answered(endpoint, status, method)
        if CALL in scope:
            scope[CALL].status = status
        level = logging.DEBUG if self._is_quiet(endpoint, status) else logging.INFO
        if access_log.isEnabledFor(level):
            line, fields = access_line(scope, status, request_id), access_fields(scope, status, request_id)
            access_log.log(level, "%s", line, extra={"fields": fields})

    def _is_quiet(self, endpoint: str, status: int) -> bool:
        """Whether an answer is a machine's business."""
        if endpoint not in HEALTH_CHECKS:
            return endpoint in QUIET or (endpoint in OF_THE_PAGE and status < 400)
        before, self._last_health[endpoint] = self._last_health.get(endpoint), status
        return before == status


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


def access_fields(scope: Scope, status: int, request_id: bytes) -> dict[str, Any]:
    """The same by name, for a log of JSON."""
    host, _ = scope.get("client") or ("-", 0)
    path = scope["raw_path"].decode("latin-1")
    fields = {"client": host, "method": scope["method"], "path": path, "status": status}
    return fields | ({"request_id": request_id.decode("latin-1")} if request_id else {})


too_large = PlainTextResponse(
    f"The request head exceeds the limit of {MAX_HEADER_BYTES} bytes.", 431, {"Connection": "close"}
)
