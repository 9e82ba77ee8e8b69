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
    """What is read of a response that was kept."""

    id: str
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
    responses = await convert_body(http, responses_of, wanted.values())
    kept = await store.run(store.several, responses, gateway.config.max_body_size)
    raws, size = await asyncio.to_thread(chosen, kept, wanted, http.scope[BOUNDS], http.scope.get(SIZE, 0))
    http.scope[SIZE] = size
    return msgspec.structs.replace(body, input=await convert_body(http, replaced, body.input, raws))


def references(given: Sequence[Item]) -> dict[int, str]:
    """The ids that references name, by their place in the input. Raises RequestError."""
    return {index: id_of(item, index) for index, item in enumerate(given) if is_reference(item)}


def is_reference(item: Item) -> bool:
    """Whether an item is a reference; the type may be left out, and then there is nothing but the id."""
    kind = item.get("type")
    return kind == REFERENCE or (kind is None and "id" in item and item.keys() <= {"id", "type"})


def id_of(item: Item, index: int) -> str:
    """The id that a reference names. Raises RequestError."""
    own_id = item.get("id")
    if not isinstance(own_id, str):
        raise RequestError(f"input[{index}]: id must be a string in an item of type {REFERENCE!r}.", field="input")
    return own_id


def responses_of(item_ids: Iterable[str]) -> list[str]:
    """The responses that items belong to; this server has made no other ids."""
    found = map(response_of, item_ids)
    return list(dict.fromkeys(response_id for response_id in found if response_id is not None))


def response_of(item_id: str) -> str | None:
    """The response that an item belongs to; None for an id that this server has not made."""
    own = OWN_ID.fullmatch(item_id)
    return PREFIX + own[1] if own else None


def chosen(
    kept: Iterable[StoredResponse], wanted: Mapping[int, str], bounds: Bounds, body_size: int
) -> tuple[dict[int, msgspec.Raw], int]:
    """The items that are wanted, and the bytes of the body with them.

    Raises RequestError where one is missing (404), or the body is too large with them (413): one item may be named many
    times.
    """
    by_id = items_by_id(kept)
    for index, item_id in wanted.items():
        if item_id not in by_id:
            raise RequestError(NOT_FOUND.format(f"input[{index}]", short(item_id)), Kind.NOT_FOUND, "input")
    raws = {index: by_id[item_id] for index, item_id in wanted.items()}
    counter, size = ValueCounter(), body_size + sum(memoryview(raw).nbytes for raw in raws.values())
    bounds.check_size(size, counter)  # first: nothing is copied of what is too much
    for raw in raws.values():
        counter.feed(bytes(raw))
    bounds.check_size(size, counter)
    return raws, size


def items_by_id(kept: Iterable[StoredResponse]) -> dict[str, msgspec.Raw]:
    """The items of responses and of their requests. Raises RequestError (503) for what is no response.

    A request may have items of other responses, as its client had them: those do not stand for the real ones.
    """
    found: dict[str, msgspec.Raw] = {}
    for stored in kept:
        try:
            items = msgspec.json.decode(stored.input, type=Raws)
            response = msgspec.json.decode(stored.response, type=Output)
            items += response.output
            ids = [msgspec.json.decode(item, type=Identified).id for item in items]
        except msgspec.DecodeError as error:
            raise RequestError(UNREADABLE.format(error), Kind.UNAVAILABLE, "input") from error
        pairs = zip(ids, items, strict=True)
        found |= {item_id: item for item_id, item in pairs if response_of(item_id) == response.id}
    return found


def replaced(given: Sequence[Item], raws: Mapping[int, msgspec.Raw]) -> list[Item]:
    """The input with the items in their places."""
    return [msgspec.json.decode(raws[index], type=Item) if index in raws else item for index, item in enumerate(given)]
