"""The shapes in which clients see an error; one table says which shape a status has on which side of the API.

    (a)  {"error": {"message": …}}                                   native endpoints, the request's own fault
    (b)  {"object": "error", "message", "type", "param", "code"}     OpenAI endpoints, body schema, refusals of the ring
    (c)  {"error": {"message", "type", "param", "code"}}             a model that is not served
    (d)  {"success": false, "message": …}                            control endpoints

Shape (b) also carries a copy of itself under "error", for clients that look there.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from quartet.runtime.errors import FieldRefused, Kind, RequestError
from quartet.runtime.messages import Finish
from quartet.runtime.shorten import short

RETRY_AFTER_S = 1
FIELD_HEADER = "X-Error-Field"
FIELD_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,100}")
PLACE = re.compile(r" - at `\$\.([^`]+)`$")  # in a JSON body, as msgspec ends its messages
OVERLOAD = (Kind.TOO_MANY.status, Kind.UNAVAILABLE.status)
KIND_OF_STATUS = {kind.status: kind for kind in Kind}

Shape = Callable[[RequestError], Response]


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def flat(
    message: str, type_name: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of shape (b). OpenAI's `code`, where the error has one, stands in the copy for that API's clients."""
    body = {"object": "error", "message": message, "type": type_name, "param": param, "code": status}
    return {**body, "error": {**body, "code": code or status}}


def headers_of(error: RequestError) -> dict[str, str]:
    """Those that clients act upon, and the field that is wrong, which some shapes have no place for."""
    return named_field(error) | headers_of_kind(error)


def named_field(error: RequestError) -> dict[str, str]:
    """A field may be a key of the client's JSON, so not every one may stand in a header."""
    return {FIELD_HEADER: error.field} if error.field and FIELD_NAME.fullmatch(error.field) else {}


def headers_of_kind(error: RequestError) -> dict[str, str]:
    if error.kind.status in OVERLOAD:
        return {"Retry-After": str(RETRY_AFTER_S)}
    if error.kind is Kind.UNAUTHORIZED:
        return {"WWW-Authenticate": "Bearer"}
    return {"Connection": "close"} if error.kind is Kind.TOO_LARGE else {}


def native(error: RequestError) -> Response:
    """(a) for what the client can mend, (b) for refusals and failures of the server."""
    status = error.kind.status
    if status in OVERLOAD or status >= 500:
        return json_response(flat(error.message, str(status), status), status, headers_of(error))
    return json_response({"error": {"message": error.message}}, status, headers_of(error))


def openai(error: RequestError) -> Response:
    """(b) throughout."""
    return json_response(described(error), error.kind.status, headers_of(error))


def with_client_names(shape: Shape, names: Mapping[str, str]) -> Shape:
    """The same shape for an API with other field names: `names` maps the ring's names to the client's."""

    return lambda error: shape(renamed(error, names))


def renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """The same error with the client's names of fields in place of the ring's."""
    if isinstance(error, FieldRefused):
        return error
    message = error.message
    for ours, theirs in names.items():
        if "_" in ours or ours == error.field:  # other names are plain words too
            message = re.sub(rf"\b{ours}\b", theirs, message, count=0 if "_" in ours else 1)
    return RequestError(message, error.kind, names.get(error.field or "", error.field), error.code)


def described(error: RequestError) -> dict[str, Any]:
    return flat(error.message, error.kind.type_name, error.kind.status, error.field, error.code)


def control(error: RequestError) -> Response:
    """(d) throughout."""
    status = error.kind.status
    return json_response({"success": False, "message": error.message}, status, headers_of(error))


def of_schema(error: Exception) -> RequestError:
    """What a body is that is not JSON or has the wrong types."""
    return RequestError(f"Invalid request body: {error}")


def schema(error: Exception) -> Response:
    """The same in shape (b), on every route but those of APIs with a shape of their own for every error."""
    place = PLACE.search(str(error))
    headers = named_field(RequestError("", field=place[1])) if place else {}
    return json_response(flat(of_schema(error).message, "Bad Request", 400), 400, headers)


def no_route(method: str, path: str) -> dict[str, Any]:
    """What (b) says of a path that no endpoint has."""
    return flat(f"Invalid URL ({method} {short(path)})", Kind.NOT_FOUND.type_name, Kind.NOT_FOUND.status)


def model_not_found(model: str) -> Response:
    """(c)"""
    error = {
        "message": f"The model '{model}' does not exist",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    return json_response({"error": error}, 404)


def stream_event(error: RequestError) -> bytes:
    """An error behind headers that have been sent, as the JSON of an event."""
    status = error.kind.status
    type_name = "invalid_request_error" if status < 500 else "internal_server_error"
    detail = {"message": error.message, "type": type_name, "code": status, "retryable": status in OVERLOAD}
    return msgspec.json.encode({"error": detail})


def openai_stream_event(error: RequestError) -> bytes:
    """The same in the shape of the OpenAI endpoints."""
    return msgspec.json.encode({"error": described(error)["error"]})


def error_of_finish(finish: Finish) -> RequestError:
    """The error that a terminal message with reason `error` stands for."""
    return RequestError(finish.message, KIND_OF_STATUS.get(finish.status, Kind.INTERNAL), finish.field, finish.code)
