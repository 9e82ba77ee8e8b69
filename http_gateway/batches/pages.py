"""Lists that are read page by page, as OpenAI's API has it: `limit`, `order` and `after`."""

from collections.abc import Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HTTPRequest

from quartet.runtime.errors import RequestError
from quartet.runtime.shorten import short

Item = TypeVar("Item")


def choice(http: HTTPRequest, name: str, allowed: Sequence[str]) -> str:
    """A query parameter that is one of some words; the first one by default. Raises RequestError."""
    given = http.query_params.get(name, allowed[0])
    if given not in allowed:
        raise RequestError(f"{name} must be {' or '.join(allowed)}, got {short(given)!r}.", field=name)
    return given


def limit_of(http: HTTPRequest, default: int, most: int) -> int:
    """How many items the client asks for. Raises RequestError."""
    limit = http.query_params.get("limit", str(default))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 6 and 1 <= int(limit) <= most):
        raise RequestError(f"limit must be from 1 to {most}, got {short(limit)!r}.", field="limit")
    return int(limit)


def not_listed(after: str) -> RequestError:
    return RequestError(f"after: there is no {short(after)!r} in the list.", field="after")


def page(http: HTTPRequest, items: Sequence[dict[str, Any]], default: int, most: int) -> dict[str, Any]:
    """The part of the list that the client asks for. Raises RequestError."""
    limit = limit_of(http, default, most)
    after = http.query_params.get("after")
    if after is not None:
        place = next((index for index, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise not_listed(after)
        items = items[place + 1 :]
    return shown(items, limit)


def shown(items: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """The first items as a page, and whether there are more."""
    shown = items[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(items) > len(shown)}
