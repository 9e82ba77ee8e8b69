"""The items of earlier requests and responses: as they are kept, and as a conversation that goes on."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest

from quartet.http_gateway.http.counting import ValueCounter
from quartet.http_gateway.openai.response_items import INCOMPLETE
from quartet.http_gateway.routes.endpoint import BOUNDS, SIZE
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.response_store import StoredResponse
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.shorten import short

Item = dict[str, Any]

PREVIOUS_NOT_FOUND = "Previous response with id {!r} not found, or an earlier one of its conversation."
NOT_OVER = "Previous response with id {!r} is not over yet."
UNREADABLE = "The conversation cannot be read from the store of responses: {}"
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


class Stored(msgspec.Struct):
    """What is read of a response that was kept."""

    output: list[Item]
    background: bool = False


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
    if gateway.background.get(response_id) is not None:
        raise RequestError(NOT_OVER.format(short(response_id)), field="previous_response_id")
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
