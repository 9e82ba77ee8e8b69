"""GET /openapi.json and /docs: the API described by its own types, and a page that shows it with the network off."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.http.auth import Access
from quartet.http_gateway.openai.answers import Failure
from quartet.http_gateway.routes.endpoint import Endpoint
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.control import ControlCommand
from quartet.runtime.version import version

DISABLED_BY = "DISABLE_OPENAPI_DOC"  # environment variable of the API that this one is compatible with
PAGE = Path(__file__).parent / "page" / "docs.html"
REF = "#/components/schemas/{name}"
JSON = "application/json"
OF_THE_RING = (
    "id",
    "epoch",
    "rank",
    "waits_for_others",
    "attempt",
    "type",
)  # fields of a command that its client does not send
FAILURES = {
    "400": "The request cannot be served; the message names the field.",
    "401": "The key is missing or wrong.",
    "404": "There is no such thing.",
    "413": "The body is too large.",
    "503": "Overloaded, starting or shutting down; try again.",
}

Schema = dict[str, Any]


def endpoints(described: Sequence[Endpoint]) -> list[Endpoint]:
    """The routes that describe the others; none where the operator does not want them."""
    if os.environ.get(DISABLED_BY):
        return []

    @cache
    def text() -> bytes:
        return msgspec.json.encode(document(described))

    async def openapi(gateway: Gateway, http: HTTPRequest) -> Response:
        """This description."""
        return Response(text(), media_type=JSON)

    async def docs(gateway: Gateway, http: HTTPRequest) -> Response:
        """A page to read it on."""
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8")

    page = Endpoint("/docs", docs, access=Access.PUBLIC)  # says nothing of this server; the description wants the key
    return [Endpoint("/openapi.json", openapi), page]


def document(described: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI description of these endpoints."""
    types = list(dict.fromkeys(kind for e in described for kind in (e.body, e.answer, e.failure) if kind is not None))
    found, components = msgspec.json.schema_components([*types, Failure], ref_template=REF)
    for kind in types:
        if isinstance(kind, type) and issubclass(kind, ControlCommand):
            forget_ring_fields(components[kind.__name__])
    schemas = dict(zip([*types, Failure], found, strict=True))
    return {
        "openapi": "3.1.0",
        "info": {"title": "Quartet", "version": version()},
        "paths": paths(described, schemas, components),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def forget_ring_fields(schema: Schema) -> None:
    for name in OF_THE_RING:
        schema["properties"].pop(name, None)
    schema["required"] = [name for name in schema.get("required", ()) if name not in OF_THE_RING]


def paths(described: Sequence[Endpoint], schemas: dict[Any, Schema], components: Schema) -> dict[str, Schema]:
    """The `paths` object: one entry for each path, one operation for each of its methods."""
    found: dict[str, Schema] = {}
    for endpoint in described:
        operations = {
            method.lower(): operation(endpoint, method, schemas, components)
            for method in endpoint.methods
            if method != "HEAD"
        }
        found.setdefault(endpoint.path.replace(":path}", "}"), {}).update(operations)
    return found


def operation(endpoint: Endpoint, method: str, schemas: dict[Any, Schema], components: Schema) -> Schema:
    """One method of one path."""
    summary = (endpoint.handler.__doc__ or title(endpoint.path)).strip().partition("\n")[0]
    made: Schema = {
        "summary": summary,
        "operationId": f"{method.lower()}{endpoint.path.replace('/', '_').replace(':path', '')}",
        "tags": [tag(endpoint)],
        "parameters": path_parameters(endpoint.path),
        "responses": responses(
            schemas[endpoint.answer] if endpoint.answer else {}, schemas[endpoint.failure or Failure]
        ),
    }
    if endpoint.access is not Access.PUBLIC:
        made["security"] = [{"key": []}, {"x-api-key": []}]
    if endpoint.body is not None and method == "GET":
        made["parameters"] += query_parameters(components[endpoint.body.__name__])
    elif endpoint.body is not None:
        optional = isinstance(endpoint.body, type) and issubclass(endpoint.body, ControlCommand)
        made["requestBody"] = {"required": not optional, "content": {JSON: {"schema": schemas[endpoint.body]}}}
    return made


def title(path: str) -> str:
    return path.strip("/").replace("_", " ").replace("/", " ").capitalize() or "The server's own page"


def tag(endpoint: Endpoint) -> str:
    if endpoint.access is Access.ADMIN:
        return "control"
    if endpoint.path.startswith("/v1/messages"):
        return "anthropic"
    return "openai" if endpoint.path.startswith("/v1/") else "native"


def path_parameters(path: str) -> list[Schema]:
    names = [part.strip("{}").removesuffix(":path") for part in path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def query_parameters(schema: Schema) -> list[Schema]:
    """A command's fields, as a GET takes them."""
    return [{"name": name, "in": "query", "schema": kind} for name, kind in schema["properties"].items()]


def responses(answer: Schema, failure: Schema) -> Schema:
    made: Schema = {"200": {"description": "The answer.", "content": {JSON: {"schema": answer}}}}
    for status, meaning in FAILURES.items():
        made[status] = {"description": meaning, "content": {JSON: {"schema": failure}}}
    return made
