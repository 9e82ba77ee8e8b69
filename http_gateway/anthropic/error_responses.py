"""Error responses of Anthropic's API, and the request id that they contain."""

import uuid
from collections.abc import Mapping

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from quartet.http_gateway.anthropic.conversation import NO_THREADS
from quartet.http_gateway.anthropic.types import ErrorAnswer, ErrorCode, ErrorDetail
from quartet.http_gateway.http import errors
from quartet.http_gateway.http.sse import Event, StreamFormat
from quartet.http_gateway.routes.middleware import given_request_id
from quartet.runtime.errors import RequestError

PING = Event(b'{"type":"ping"}', b"ping")
VERSION = b"anthropic-version"
ROUTE = "/v1/messages"  # and all below it
REQUEST_ID = "request-id"  # header
SCOPE_KEY = "quartet.request_id"
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
TOO_LONG = "prompt is too long: {}"  # agents look for these words, then compact the conversation
NAMES = {
    "max_new_tokens": "max_tokens",
    "response_format": "output_config",
    "continue_final_message": "messages",
    "stop": "stop_sequences",
    "call_grammar": "tools",
    "text": "messages",
}


def from_client(scope: Scope) -> bool:
    """Whether a client of Anthropic's API sent the request."""
    return any(name == VERSION for name, _ in scope["headers"])


def request_id(scope: Scope) -> str:
    """The id of the request: the client's own (X-Request-Id), or a new one."""
    known: str | None = scope.get(SCOPE_KEY)
    if known is None:
        known = given_request_id(scope["headers"]).decode("latin-1") or f"req_{uuid.uuid4().hex}"
        scope[SCOPE_KEY] = known
    return known


def headers(scope: Scope) -> dict[str, str]:
    """The headers of every answer to this request."""
    return {REQUEST_ID: request_id(scope)}


def with_status(scope: Scope, status: int, message: str, more: Mapping[str, str]) -> Response:
    """An error whose status no RequestError has, with these headers. Its type is that of the client's own faults."""
    answer = ErrorAnswer(error=ErrorDetail(TYPES.get(status, TYPES[400]), message), request_id=request_id(scope))
    return errors.json_response(answer, status, {**more, **headers(scope)})


def error_body(error: RequestError, request: str) -> ErrorAnswer:
    """The body of an error response. `request`: the request id."""
    long = error.code == "context_length_exceeded" and error.field in ("prompt", "messages")
    message = TOO_LONG.format(error.message) if long else error.message
    details = ErrorCode(NO_THREADS, ["thread"]) if error.code == NO_THREADS else None
    return ErrorAnswer(error=ErrorDetail(TYPES[error.kind.status], message, details), request_id=request)


def shape(scope: Scope) -> errors.Shape:
    """The shape of every error of this request."""
    request = request_id(scope)

    def respond(error: RequestError) -> Response:
        sent = {**errors.headers_of(error), **headers(scope)}
        return errors.json_response(error_body(error, request), error.kind.status, sent)

    return errors.with_client_names(respond, NAMES)


def shape_for_clients(scope: Scope) -> errors.Shape | None:
    """The same for a route that clients of OpenAI's API use too; None for those."""
    return shape(scope) if from_client(scope) else None


def shape_for_scope(scope: Scope) -> errors.Shape | None:
    """The same for a request that no handler has: under this API's route, or of a client of this API."""
    return shape(scope) if f"{scope['path']}/".startswith(f"{ROUTE}/") or from_client(scope) else None


def stream_format(scope: Scope) -> StreamFormat:
    """The streams of this API. An error after the response has started becomes an event of type `error`."""
    request = request_id(scope)
    return StreamFormat(
        error_json=lambda error: msgspec.json.encode(error_body(error, request)),
        error_type=b"error",
        end=b"",
        headers=headers(scope),
        ping=PING,
    )
