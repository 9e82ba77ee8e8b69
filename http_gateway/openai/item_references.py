"""References to items in the input of /v1/responses: each becomes the item that was kept under its id.

The id of an item of this server contains that of its response, so nothing else has to be looked up.
"""

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest

from quartet.http_gateway.http.counting import ValueCounter
from quartet.http_gateway.openai.response_history import UNREADABLE
from quartet.http_gateway.openai.response_input import PREFIX
from quartet.http_gateway.openai.response_types import ResponsesBody
from quartet.http_gateway.routes.endpoint import BOUNDS, SIZE, Bounds, convert_body
from quartet.http_gateway.routes.gateway import Gateway
from quartet.http_gateway.routes.response_store import StoredResponse
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.shorten import short

REFERENCE = "item_reference"
OWN_ID = re.compile(r"(?:msg|rs|fc|fco)_([0-9a-f]{32})(?:_(?:in)?[0-9]+)?")
NOT_FOUND = "{}: item with id {!r} not found. Items of responses with store: false are not kept; send the item itself."

Item = dict[str, Any]
Raws = list[msgspec.Raw]


class Output(msgspec.Struct):
    """The items of a response that was kept."""

    output: Raws


class Identified(msgspec.Struct):
    """What is read of an item in order to find it."""

    id: str


async def with_items(gateway: Gateway, http: HTTPRequest, body: ResponsesBody) -> ResponsesBody:
    """The body with items in place of references. Raises RequestError (404) for one that is not kept.

    They count as part of the body: for its limits, and for the choice of a thread to convert it.
    """
    if isinstance(body.input, str):
        return body
    wanted = await convert_body(http, references, body.input)
    if not wanted:
        return body
    store = gateway.stored_responses
    kept = await store.run(store.several, responses_of(wanted.values()), gateway.config.max_body_size)
    raws = await asyncio.to_thread(chosen, kept, wanted, http.scope[BOUNDS])
    http.scope[SIZE] = http.scope.get(SIZE, 0) + size_of(raws.values())
    return msgspec.structs.replace(body, input=await convert_body(http, replaced, body.input, raws))


def references(given: Sequence[Item]) -> dict[int, str]:
    """The ids that references name, by their place in the input. Raises RequestError."""
    return {index: id_of(item, index) for index, item in enumerate(given) if item.get("type") == REFERENCE}


def id_of(item: Item, index: int) -> str:
    """The id that a reference names. Raises RequestError."""
    own_id = item.get("id")
    if not isinstance(own_id, str):
        raise RequestError(f"input[{index}]: id must be a string in an item of type {REFERENCE!r}.", field="input")
    return own_id


def responses_of(item_ids: Iterable[str]) -> list[str]:
    """The responses that items belong to; this server has made no other ids."""
    found = (OWN_ID.fullmatch(item_id) for item_id in item_ids)
    return list(dict.fromkeys(PREFIX + own[1] for own in found if own))


def chosen(kept: Iterable[StoredResponse], wanted: Mapping[int, str], bounds: Bounds) -> dict[int, msgspec.Raw]:
    """The items that are wanted. Raises RequestError where one is missing (404), or they are too much for a body (413).

    One item may be named many times.
    """
    by_id = items_by_id(kept)
    for index, item_id in wanted.items():
        if item_id not in by_id:
            raise RequestError(NOT_FOUND.format(f"input[{index}]", short(item_id)), Kind.NOT_FOUND, "input")
    raws = {index: by_id[item_id] for index, item_id in wanted.items()}
    counter, size = ValueCounter(), size_of(raws.values())
    bounds.check_size(size, counter)
    for raw in raws.values():
        counter.feed(bytes(raw))
    bounds.check_size(size, counter)
    return raws


def items_by_id(kept: Iterable[StoredResponse]) -> dict[str, msgspec.Raw]:
    """The items of responses and of their requests. Raises RequestError (503) for what is no response."""
    found: dict[str, msgspec.Raw] = {}
    for stored in kept:
        try:
            items = msgspec.json.decode(stored.input, type=Raws)
            items += msgspec.json.decode(stored.response, type=Output).output
            found |= {msgspec.json.decode(item, type=Identified).id: item for item in items}
        except msgspec.DecodeError as error:
            raise RequestError(UNREADABLE.format(error), Kind.UNAVAILABLE, "input") from error
    return found


def size_of(raws: Iterable[msgspec.Raw]) -> int:
    return sum(len(bytes(raw)) for raw in raws)


def replaced(given: Sequence[Item], raws: Mapping[int, msgspec.Raw]) -> list[Item]:
    """The input with the items in their places."""
    return [msgspec.json.decode(raws[index], type=Item) if index in raws else item for index, item in enumerate(given)]
