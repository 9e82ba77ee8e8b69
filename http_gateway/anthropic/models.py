"""GET /v1/models: the served model, as Anthropic's API describes one to its clients, and OpenAI's to all others."""

from datetime import UTC, datetime

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.admin import info
from quartet.http_gateway.anthropic import error_responses
from quartet.http_gateway.anthropic.types import ModelCard, ModelPage
from quartet.http_gateway.http import errors
from quartet.http_gateway.routes.endpoint import Endpoint
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.errors import Kind, RequestError


def model_card(gateway: Gateway, name: str) -> ModelCard:
    """The served model, or an adapter of it."""
    return ModelCard(
        id=name,
        display_name=name,
        created_at=datetime.fromtimestamp(int(gateway.started_at), UTC).isoformat(),
        max_input_tokens=gateway.facts.max_req_input_len,
        max_tokens=gateway.facts.context_length,
    )


async def models(gateway: Gateway, http: HTTPRequest) -> Response:
    """The model that is served, and its adapters; with the header anthropic-version in the shape of that API."""
    if not error_responses.from_client(http.scope):
        return await info.models(gateway, http)
    beyond = any(http.query_params.get(cursor) for cursor in ("after_id", "before_id"))  # there is one page
    names = [] if beyond else [gateway.name, *(adapter.name for adapter in gateway.adapters)]
    cards = [model_card(gateway, name) for name in names]
    page = ModelPage(data=cards, first_id=cards[0].id if cards else None, last_id=cards[-1].id if cards else None)
    return answer(http, page)


async def model(gateway: Gateway, http: HTTPRequest) -> Response:
    """The model of this name; with the header anthropic-version in the shape of that API."""
    if not error_responses.from_client(http.scope):
        return await info.model(gateway, http)
    asked = http.path_params["model"]
    if asked not in gateway.base_names and asked not in gateway.adapters:
        raise RequestError(f"model: {asked}", Kind.NOT_FOUND, "model")
    return answer(http, model_card(gateway, asked if asked in gateway.adapters else gateway.name))


def answer(http: HTTPRequest, content: ModelPage | ModelCard) -> Response:
    return errors.json_response(content, headers=error_responses.headers(http.scope))


ENDPOINTS = [
    Endpoint("/v1/models", models, shape=errors.openai, own_shape=error_responses.shape_for_clients),
    Endpoint("/v1/models/{model:path}", model, shape=errors.openai, own_shape=error_responses.shape_for_clients),
]
