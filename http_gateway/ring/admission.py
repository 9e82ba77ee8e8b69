"""What is refused before it is sent: a rid in use, a request like one that has ended processes, too many in flight."""

import time
from collections.abc import Container

from quartet.http_gateway.ring.quarantine import Quarantine
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Generate

BLOCKED_REQUEST = (
    "A request like this one has ended a process of the server again and again; it is not tried for ten minutes."
)


def check_each(batch: list[Generate], pending: Container[str], quarantine: Quarantine) -> None:
    """Raise RequestError where a rid is in use or a request is blocked. `pending`: the rids in use."""
    for generate in batch:
        if generate.request.rid in pending:
            raise RequestError(f"Duplicate request ID detected: {generate.request.rid}", field="rid")
        if quarantine.blocks(generate, time.monotonic()):
            raise RequestError(BLOCKED_REQUEST, Kind.INTERNAL)


def check_room(more: int, in_flight: int, limit: int) -> None:
    """Raise RequestError where so many more requests do not fit."""
    if more > limit:
        raise RequestError(f"One call may hold at most {limit} requests, got {more}.")
    if in_flight + more > limit:
        raise RequestError(
            f"The server is full: {in_flight} of at most {limit} requests are in flight.", Kind.UNAVAILABLE
        )
