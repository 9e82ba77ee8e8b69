"""uvicorn, with the launcher's sockets: TCP with or without TLS, and Unix sockets, which speak plain HTTP."""

import asyncio
import signal
import socket
import ssl
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from quartet.http_gateway.http.connection_limit import ConnectionLimit, connections_that_fit
from quartet.http_gateway.http.protocol import BoundedProtocol
from quartet.runtime.config import ServerConfig
from quartet.runtime.limits import HEADER_DEADLINE_S

KEEP_ALIVE_S = 75  # clients hold pools of idle connections


class Server(uvicorn.Server):
    """uvicorn, but a signal asks `on_terminate` what to do, and `on_started` hears when connections are accepted."""

    def __init__(
        self, config: uvicorn.Config, on_started: Callable[[], None], on_terminate: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._on_terminate = on_terminate

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept connections on the sockets."""
        await super().startup([])
        for listener in sockets or ():
            self.servers.append(await self._accept(listener))
        self._on_started()

    async def _accept(self, listener: socket.socket) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        if listener.family == socket.AF_UNIX:
            return await loop.create_unix_server(self._protocol, sock=listener, backlog=self.config.backlog)
        return await loop.create_server(
            self._protocol,
            sock=listener,
            ssl=self.config.ssl,
            backlog=self.config.backlog,
            ssl_handshake_timeout=HEADER_DEADLINE_S if self.config.ssl else None,
        )

    def _protocol(self) -> asyncio.Protocol:
        made = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        assert isinstance(made, asyncio.Protocol), made
        return made

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM:  # Ctrl-C is the launcher's business
            self._on_terminate()


def uvicorn_config(
    config: ServerConfig, app: object, tls: ssl.SSLContext | None, graceful_shutdown_s: float
) -> uvicorn.Config:
    """uvicorn's configuration: our protocol with its connection limit, no access log of its own."""
    made = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=partial(BoundedProtocol, connection_limit=ConnectionLimit(connections_that_fit())),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=config.log_level,
        access_log=False,  # http_gateway/routes/middleware.py writes these lines
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(graceful_shutdown_s),
    )
    made.load()
    made.ssl = tls
    return made
