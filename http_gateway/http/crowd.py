"""How many connections may be open, and who has to go when there are too many.

Up to a limit everybody is let in. Then the connection that has been idle for longest gives way. Where none is idle, a
few more are let in for the questions of monitors alone: whoever asks for anything else there is told to come again.
When those places are taken too, the oldest of them is closed, so that a monitor always gets in.
"""

import contextlib
import resource
from pathlib import Path
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from quartet.http_gateway.http import errors
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import MAX_CONNECTIONS

ROOM = 8  # connections beyond the limit, for monitors
SPARE_DESCRIPTORS = 8  # for files, and for connections that are closed as soon as they are there
MONITORS = {"/livez", "/readyz", "/ready", "/ping", "/health", "/health_generate", "/metrics"}
FULL = "The server has no room for more connections."


class Connection(Protocol):
    def give_way(self) -> None:
        """Close at once."""
        ...


class Crowd:
    """The open connections of a server."""

    def __init__(self, limit: int = MAX_CONNECTIONS, room: int = ROOM) -> None:
        self._limit = limit
        self._room = room
        self._wide: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}  # those of the wide ones that no request is on, longest idle first
        self._narrow: dict[Connection, None] = {}

    def enter(self, connection: Connection) -> bool:
        """Let a connection in; whether it is for any request, and not for monitors alone."""
        if len(self._wide) >= self._limit and self._idle:
            self._close(next(iter(self._idle)))
        if len(self._wide) < self._limit:
            self._wide[connection] = self._idle[connection] = None
            return True
        if len(self._narrow) >= self._room:
            self._close(next(iter(self._narrow)))
        self._narrow[connection] = None
        return False

    def leave(self, connection: Connection) -> None:
        for place in (self._wide, self._idle, self._narrow):
            place.pop(connection, None)

    def note(self, connection: Connection, idle: bool) -> None:
        """A request has begun, or the last one has been answered."""
        self._idle.pop(connection, None)
        if idle and connection in self._wide:
            self._idle[connection] = None

    def _close(self, connection: Connection) -> None:
        self.leave(connection)  # its place is free now, though the transport takes a moment
        connection.give_way()


def monitors_only(app: ASGIApp) -> ASGIApp:
    """The application for a connection beyond the limit; it ends with its answer."""
    full = errors.native(RequestError(FULL, Kind.UNAVAILABLE))
    full.headers["Connection"] = "close"

    async def narrow(scope: Scope, receive: Receive, send: Send) -> None:
        await (app if scope["path"] in MONITORS else full)(scope, receive, send)

    return narrow


def connections_that_fit() -> int:
    """How many connections the process's descriptors allow beside what it has open. Takes as many as it may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    used = len(list(Path("/proc/self/fd").iterdir()))
    return max(1, min(MAX_CONNECTIONS, allowed - used - SPARE_DESCRIPTORS - ROOM))
