"""Responses that were kept: conversations that go on from them, and /v1/responses/{id} with what is below it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.http import errors
from quartet.http_gateway.http.counting import ValueCounter
from quartet.http_gateway.openai.response_input import check_include
from quartet.http_gateway.openai.response_items import INCOMPLETE
from quartet.http_gateway.routes.endpoint import BOUNDS, SIZE, Endpoint
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.response_store import StoredResponse
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.shorten import short

Item = dict[str, Any]


class Stored(msgspec.Struct):
    """What is read of a response that was kept."""

    output: list[Item]


NOT_FOUND = "Response with id {!r} not found."
PREVIOUS_NOT_FOUND = "Previous response with id {!r} not found, or an earlier one of its conversation."
UNREADABLE = "The conversation cannot be read from the store of responses: {}"
NOT_CANCELLED = "Response {!r} cannot be cancelled: it is over, and only background responses could be."
DEFAULT_PAGE, MOST_PER_PAGE = 20, 100
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def input_items(items: Sequence[Item], call_id: str) -> list[Item]:
    """The items of a request as they are kept and listed: with type, id and status, the text of messages in parts."""
    listed: list[Item] = []
    used: set[str] = set()
    for index, item in enumerate(items):
        kind, own_id = item.get("type") or "message", item.get("id")
        if not isinstance(own_id, str) or own_id in used:
            own_id = f"{PREFIXES[kind]}_{call_id}_in{index}"
        used.add(own_id)
        listed.append(full_item({"status": "completed", **item, "type": kind, "id": own_id}))
    return listed


def full_item(item: Item) -> Item:
    """The item with the text of a message in parts."""
    content = item.get("content")
    if item["type"] == "message" and isinstance(content, str):
        by_model = item.get("role") == "assistant"
        more: Item = {"annotations": []} if by_model else {}
        return {**item, "content": [{"type": "output_text" if by_model else "input_text", "text": content, **more}]}
    return item


async def earlier_items(gateway: Gateway, http: HTTPRequest, response_id: str | None) -> list[Item]:
    """The items of the conversation that ended with this response. Raises RequestError where it is not kept.

    They count as part of the body: for its limits, and for the choice of a thread to convert it.
    """
    if response_id is None:
        return []
    most_bytes = gateway.config.max_body_size
    store = gateway.stored_responses
    chain = await store.run(store.conversation, response_id, most_bytes)
    if chain is None:
        raise RequestError(
            PREVIOUS_NOT_FOUND.format(short(response_id)),
            field="previous_response_id",
            code="previous_response_not_found",
        )
    size = sum(len(part) for stored in chain for part in stored)
    counter = ValueCounter()
    for stored in chain:
        counter.feed(stored.input)
        counter.feed(stored.response)
    http.scope[BOUNDS].check_size(size, counter)
    http.scope[SIZE] = http.scope.get(SIZE, 0) + size
    return await asyncio.to_thread(items_in, chain)


def items_in(chain: Sequence[StoredResponse]) -> list[Item]:
    """The items of a conversation. A call that was cut off is left out: its arguments are no JSON.

    Raises RequestError (503) where the store holds something else than was put there.
    """
    items: list[Item] = []
    for stored in chain:
        try:
            items += msgspec.json.decode(stored.input, type=list[Item])
            output = msgspec.json.decode(stored.response, type=Stored).output
        except msgspec.DecodeError as error:
            raise RequestError(UNREADABLE.format(error), Kind.UNAVAILABLE, "previous_response_id") from error
        items += [item for item in output if (item.get("type"), item.get("status")) != ("function_call", INCOMPLETE)]
    return items


async def stored_response(gateway: Gateway, http: HTTPRequest) -> Response:
    """A response that was kept; DELETE forgets it."""
    response_id = http.path_params["id"]
    if http.method == "DELETE":
        if not await gateway.stored_responses.run(gateway.stored_responses.delete, response_id):
            raise not_found(response_id)
        return errors.json_response({"id": response_id, "object": "response", "deleted": True})
    if http.query_params.get("stream", "false").lower() != "false":
        raise RequestError("stream is not supported: a response that is over is not streamed again.", field="stream")
    check_include(includes(http))
    return Response((await found(gateway, response_id)).response, media_type="application/json")


async def cancel(gateway: Gateway, http: HTTPRequest) -> Response:
    """Refused: a response that can be found is over."""
    response_id = http.path_params["id"]
    await found(gateway, response_id)
    raise RequestError(NOT_CANCELLED.format(short(response_id)))


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
