"""/v1/responses/{id} and what is below it: responses that were kept, and those that still run in the background."""

from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.http import errors
from quartet.http_gateway.http.sse import EventStream
from quartet.http_gateway.openai.background_responses import follow
from quartet.http_gateway.openai.response_history import Stored
from quartet.http_gateway.openai.response_input import check_include
from quartet.http_gateway.routes.endpoint import Endpoint
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.response_store import StoredResponse
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import EVENT_LOG_AGE_S
from quartet.runtime.shorten import short

Item = dict[str, Any]

NOT_FOUND = "Response with id {!r} not found."
NOT_CANCELLED = "Response {!r} cannot be cancelled: only background responses can be."
NOT_STREAMED = (
    "stream: response {!r} has no events. Those of a background response that was created with stream are kept for "
    f"{EVENT_LOG_AGE_S:.0f} s after its end."
)
SWITCH = {"true": True, "1": True, "false": False, "0": False}
MOST_DIGITS = 9  # of the number of an event
DEFAULT_PAGE, MOST_PER_PAGE = 20, 100


async def stored_response(gateway: Gateway, http: HTTPRequest) -> Response | EventStream:
    """A response that was kept, or runs in the background, or its stream; DELETE forgets it."""
    response_id = http.path_params["id"]
    run = gateway.background.get(response_id)
    if http.method == "DELETE":
        if run is not None:
            await run.cancel()
        gateway.event_logs.drop(response_id)
        if not await gateway.stored_responses.run(gateway.stored_responses.delete, response_id):
            raise not_found(response_id)
        return errors.json_response({"id": response_id, "object": "response", "deleted": True})
    check_include(includes(http))
    start = first_event(http)
    if start is not None:
        return await streamed_again(gateway, http, start)
    if run is not None:
        return errors.json_response(run.describe())
    return Response((await found(gateway, response_id)).response, media_type="application/json")


def first_event(http: HTTPRequest) -> int | None:
    """The number of the first event that the client wants; None where it wants no stream. Raises RequestError."""
    given, after = http.query_params.get("stream", "false"), http.query_params.get("starting_after")
    stream = SWITCH.get(given.lower())
    if stream is None:
        raise RequestError(f"stream must be true or false, got {short(given)!r}.", field="stream")
    if after is None:
        return 0 if stream else None
    if not stream:
        raise RequestError("starting_after needs stream to be true.", field="starting_after")
    if not (after.isascii() and after.isdecimal() and len(after) <= MOST_DIGITS):
        raise RequestError(
            f"starting_after must be the number of an event, got {short(after)!r}.", field="starting_after"
        )
    return int(after) + 1


async def streamed_again(gateway: Gateway, http: HTTPRequest, start: int) -> EventStream:
    """The events of a background response from this number on, and those that are still to come."""
    response_id = http.path_params["id"]
    events = gateway.event_logs.get(response_id)
    if events is None:
        if gateway.background.get(response_id) is None:
            await found(gateway, response_id)
        raise RequestError(NOT_STREAMED.format(short(response_id)), field="stream")
    return follow(http, events, start)


async def cancel(gateway: Gateway, http: HTTPRequest) -> Response:
    """The background response, cancelled unless it is over. Others cannot be found before they are over."""
    response_id = http.path_params["id"]
    run = gateway.background.get(response_id)
    if run is not None:
        await run.cancel()
        return errors.json_response(run.describe())
    response = (await found(gateway, response_id)).response
    if not msgspec.json.decode(response, type=Stored).background:
        raise RequestError(NOT_CANCELLED.format(short(response_id)))
    return Response(response, media_type="application/json")


async def listed_input(gateway: Gateway, http: HTTPRequest) -> Response:
    """The items of the request that a response answered, page by page, the last one first."""
    check_include(includes(http))
    limit = http.query_params.get("limit", str(DEFAULT_PAGE))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= MOST_PER_PAGE):
        raise RequestError(f"limit must be from 1 to {MOST_PER_PAGE}, got {short(limit)!r}.", field="limit")
    order = http.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be asc or desc, got {short(order)!r}.", field="order")
    stored = await found(gateway, http.path_params["id"])
    items: list[Item] = msgspec.json.decode(stored.input)
    if order == "desc":
        items.reverse()
    after = http.query_params.get("after")
    if after is not None:
        place = next((index for index, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise RequestError(f"after: no item with id {short(after)!r}.", field="after")
        items = items[place + 1 :]
    page = items[: int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return errors.json_response({"object": "list", "data": page, **ends, "has_more": len(items) > len(page)})


async def found(gateway: Gateway, response_id: str) -> StoredResponse:
    """The response with this id. Raises RequestError (404)."""
    stored = await gateway.stored_responses.run(gateway.stored_responses.get, response_id)
    if stored is None:
        raise not_found(response_id)
    return stored


def not_found(response_id: str) -> RequestError:
    return RequestError(NOT_FOUND.format(short(response_id)), Kind.NOT_FOUND)


def includes(http: HTTPRequest) -> list[str]:
    """The values of `include`; clients write the list as `include` or `include[]`."""
    return [*http.query_params.getlist("include"), *http.query_params.getlist("include[]")]


ENDPOINTS = [
    Endpoint("/v1/responses/{id}", stored_response, ("GET", "DELETE"), shape=errors.openai),
    Endpoint("/v1/responses/{id}/input_items", listed_input, shape=errors.openai),
    Endpoint("/v1/responses/{id}/cancel", cancel, ("POST",), shape=errors.openai),
]
