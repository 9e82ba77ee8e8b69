"""How many connections may be open, and which is closed when there are too many.

Up to the limit every connection is accepted. Then the one that has been idle for longest is closed. Where none is idle,
a few more are accepted for health checks and metrics only: other requests there get a 503. When those places are taken
too, the oldest of them is closed, so that a health check is always answered.
"""

import contextlib
import resource
from pathlib import Path
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from quartet.http_gateway.http import errors
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import MAX_CONNECTIONS

MONITORING_PLACES = 8  # connections beyond the limit, for health checks and metrics
SPARE_DESCRIPTORS = 8  # for files, and for connections that are closed as soon as they are there
MONITORS = {"/livez", "/readyz", "/ready", "/ping", "/health", "/health_generate", "/metrics"}
FULL = "The server has no room for more connections."


class Connection(Protocol):
    def close_now(self) -> None:
        """Close at once."""
        ...


class ConnectionLimit:
    """The open connections of a server, and how many there may be."""

    def __init__(self, limit: int = MAX_CONNECTIONS, monitoring: int = MONITORING_PLACES) -> None:
        self._limit = limit
        self._most_monitoring = monitoring
        self._general: dict[Connection, None] = {}  # for any request
        self._idle: dict[Connection, None] = {}  # of those, the ones without a request, longest idle first
        self._monitoring: dict[Connection, None] = {}  # beyond the limit, oldest first

    def add(self, connection: Connection) -> bool:
        """Accept a connection. Whether it is for any request, not for monitoring only."""
        if len(self._general) >= self._limit and self._idle:
            self._close(next(iter(self._idle)))
        if len(self._general) < self._limit:
            self._general[connection] = self._idle[connection] = None
            return True
        if len(self._monitoring) >= self._most_monitoring:
            self._close(next(iter(self._monitoring)))
        self._monitoring[connection] = None
        return False

    def remove(self, connection: Connection) -> None:
        for place in (self._general, self._idle, self._monitoring):
            place.pop(connection, None)

    def set_idle(self, connection: Connection, idle: bool) -> None:
        """A request has begun, or the last one has been answered."""
        self._idle.pop(connection, None)
        if idle and connection in self._general:
            self._idle[connection] = None

    def _close(self, connection: Connection) -> None:
        self.remove(connection)  # its place is free now, though the transport takes a moment
        connection.close_now()


def monitors_only(app: ASGIApp) -> ASGIApp:
    """The application for a connection beyond the limit, which is closed after its answer."""
    full = errors.native(RequestError(FULL, Kind.UNAVAILABLE))
    full.headers["Connection"] = "close"

    async def monitoring_only(scope: Scope, receive: Receive, send: Send) -> None:
        await (app if scope["path"] in MONITORS else full)(scope, receive, send)

    return monitoring_only


def connections_that_fit() -> int:
    """How many connections the process's descriptors allow beside what it has open. Takes as many as it may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    used = len(list(Path("/proc/self/fd").iterdir()))
    return max(1, min(MAX_CONNECTIONS, allowed - used - SPARE_DESCRIPTORS - MONITORING_PLACES))
