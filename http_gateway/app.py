"""The route table and the application made of it."""

from collections.abc import Callable
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from quartet.http_gateway.admin import control, health, info, openapi, parsing, web_page
from quartet.http_gateway.anthropic import error_responses, messages, models
from quartet.http_gateway.batches import batches, files, service
from quartet.http_gateway.embedding import embeddings, rerank, score, tei, vectors
from quartet.http_gateway.embedding import encode as embed
from quartet.http_gateway.http import errors, request_log
from quartet.http_gateway.http.allowed_sites import AllowedSites, CorsMiddleware, HostMiddleware
from quartet.http_gateway.http.auth import Access, Keys
from quartet.http_gateway.native import generate as native
from quartet.http_gateway.openai import chat, completions, input_tokens, responses, stored_responses, tokens
from quartet.http_gateway.routes.endpoint import Endpoint, Guarded, unauthorized
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.middleware import RequestMiddleware
from quartet.runtime.batch.lines import URLS
from quartet.runtime.errors import Kind, RequestError

ENDPOINTS: list[Endpoint] = [
    *native.ENDPOINTS,
    *completions.ENDPOINTS,
    *chat.ENDPOINTS,
    *responses.ENDPOINTS,
    *input_tokens.ENDPOINTS,
    *stored_responses.ENDPOINTS,
    *files.ENDPOINTS,
    *batches.ENDPOINTS,
    *messages.ENDPOINTS,
    *models.ENDPOINTS,
    *tokens.ENDPOINTS,
    *parsing.ENDPOINTS,
    *embed.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *tei.ENDPOINTS,
    *vectors.ENDPOINTS,
    *rerank.ENDPOINTS,
    *score.ENDPOINTS,
    *health.ENDPOINTS,
    *info.ENDPOINTS,
    *control.ENDPOINTS,
    *web_page.ENDPOINTS,
]


def build(gateway: Gateway) -> ASGIApp:
    """The whole HTTP side of a server."""
    keys, allowed_sites = Keys(gateway.config.api_key, gateway.config.admin_api_key), AllowedSites(gateway.config)
    endpoints = [*ENDPOINTS, info.METRICS] if gateway.config.enable_metrics else list(ENDPOINTS)
    endpoints += openapi.endpoints(endpoints)
    called = {one.path: Guarded(one, gateway, Keys(None, None), allowed_sites) for one in endpoints if one.path in URLS}
    runner = service.make_runner(gateway, called)
    app = Starlette(
        routes=[route(endpoint, gateway, keys, allowed_sites) for endpoint in endpoints],
        middleware=[Middleware(CorsMiddleware, allowed_sites=allowed_sites)],
        exception_handlers={HTTPException: unmatched(keys, {endpoint.path for endpoint in endpoints})},
        lifespan=service.lifespan(runner, gateway.files),
    )
    app.state.batches = runner
    app.router.redirect_slashes = False  # that redirect is built from the Host header; ours is relative
    inner = HostMiddleware(app, allowed_sites, error_responses.shape_for_scope)
    observers = [request_log.write] if gateway.config.log_requests != "off" else []
    return RequestMiddleware(inner, gateway.metrics, observers, gateway.config.log_requests == "full", gateway.tracer)


def route(endpoint: Endpoint, gateway: Gateway, keys: Keys, allowed_sites: AllowedSites) -> Route:
    made = Route(endpoint.path, Guarded(endpoint, gateway, keys, allowed_sites), methods=endpoint.methods)
    made.methods = set(endpoint.methods)  # without the HEAD that Route adds to every GET
    return made


def unmatched(keys: Keys, paths: set[str]) -> Callable[[Request, Exception], Response]:
    """Answers what no route takes: 404, 405, or the path without its trailing slash. A key is needed here too.

    A client's library reads a 404 in the shape of its API; `detail` is where others look.
    """

    def handle(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), error
        path, own_shape = http.scope["path"], error_responses.shape_for_scope(http.scope)
        if http.method != "OPTIONS" and not keys.allow(Access.USER, http.scope["headers"]):
            return unauthorized(keys.required_key(Access.USER, http.scope["headers"]), own_shape)
        if error.status_code == HTTPStatus.NOT_FOUND and path.rstrip("/") in paths:
            query = http.scope["query_string"].decode("latin-1")
            return RedirectResponse(path.rstrip("/") + (f"?{query}" if query else ""), 307)
        headers = dict(error.headers or {})
        if own_shape is not None and error.status_code == HTTPStatus.NOT_FOUND:
            return own_shape(RequestError(error.detail, Kind.NOT_FOUND))
        if own_shape is not None:
            return error_responses.with_status(http.scope, error.status_code, error.detail, headers)
        body = {"detail": error.detail}
        if path.startswith("/v1/") and error.status_code == HTTPStatus.NOT_FOUND:
            body |= errors.no_route(http.method, path)
        return errors.json_response(body, error.status_code, headers)

    return handle
