"""The gateway's process: bind the ring, hear what the scheduler has loaded, serve HTTP, warm up, drain at SIGTERM."""

import asyncio
import logging
import math
import os
import signal
import socket
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import uvloop

from quartet.http_gateway.admin import payloads, warmup
from quartet.http_gateway.app import build
from quartet.http_gateway.http.metrics import Metrics
from quartet.http_gateway.parsers import detection
from quartet.http_gateway.ring.first_lap import wait_until_connected
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.http_gateway.routes.gateway import Gateway, Phase
from quartet.http_gateway.routes.middleware import access_log
from quartet.http_gateway.server import Server, uvicorn_config
from quartet.runtime import service
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.control import Abort
from quartet.runtime.errors import StartupError
from quartet.runtime.log import level_prefix
from quartet.runtime.messages import ABORTED, ATTEMPT_BITS, GATEWAY, SCHEDULER, processes
from quartet.runtime.model_files import model_info
from quartet.runtime.model_files.chat_templates import template_dir, template_sources
from quartet.runtime.process import stopwatch
from quartet.runtime.process.memory import give_back
from quartet.runtime.process.progress import IDLE_BEAT_S, ProgressReader, ProgressWord, SlowestProgress
from quartet.runtime.service import Boot, report_ready
from quartet.runtime.settings.tls import server_context
from quartet.runtime.sockets import AsyncInbox, AsyncOutbox, newest_epoch

if TYPE_CHECKING:
    from quartet.http_gateway.http.tracing import OtlpTracer

log = logging.getLogger(__name__)
uvicorn_log = logging.getLogger("uvicorn.error")

WARMUP_SOCKET = "warmup"  # in the run directory
ABORT_GRACE_S = 2.0  # after the drain deadline, for aborted requests to come back with what they have
ATTEMPTS_OF_A_GATEWAY = 1 << ATTEMPT_BITS
EXIT_FORCED = 128 + signal.SIGTERM
HEALTH_TIMEOUT_VARIABLE = "SGLANG_HEALTH_CHECK_TIMEOUT"


class GatewayServer:
    """Serves HTTP from the first connection to the exit: warms up, reports that it is ready, drains at SIGTERM."""

    def __init__(self, boot: Boot, gateway: Gateway) -> None:
        self._boot = boot
        self._gateway = gateway
        self._loop = asyncio.get_running_loop()
        self._starting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        tls = server_context(boot.config)
        self._listeners = [socket.socket(fileno=fd) for fd in (boot.listen_fd, boot.unix_fd) if fd >= 0]
        config = uvicorn_config(boot.config, build(gateway), tls, ABORT_GRACE_S)
        self._server = Server(config, self._on_started, self._on_terminate)
        self._warmup_host = boot.config.host
        if tls is not None or boot.config.disable_tcp:  # the first request needs no certificate then
            self._warmup_host = f"{boot.run_dir}/{WARMUP_SOCKET}"

    async def serve(self) -> None:
        """Return once drained."""
        listeners = self._listeners
        if self._warmup_host != self._boot.config.host and self._warms_up:
            private = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            private.bind(self._warmup_host)
            listeners = [*listeners, private]
        await self._server.serve(listeners)

    @property
    def _warms_up(self) -> bool:
        return not (self._boot.config.skip_server_warmup or self._boot.epoch)

    def _on_started(self) -> None:
        config = self._boot.config
        host = f"[{config.host}]" if ":" in config.host else config.host
        scheme = "https" if config.ssl_certfile else "http"
        if not config.disable_tcp:
            uvicorn_log.info("Uvicorn running on %s://%s:%d (Press CTRL+C to quit)", scheme, host, config.port)
        if config.uds:
            uvicorn_log.info("Uvicorn running on unix socket %s (Press CTRL+C to quit)", config.uds)
        self._starting = self._loop.create_task(self._start(config.port))

    async def _start(self, port: int) -> None:
        """Warm up, then say that the server is ready."""
        config = self._boot.config
        try:
            if self._warms_up:
                stopwatch.mark("application and the others' start")
                await asyncio.to_thread(warmup.warm_up, config, self._warmup_host, port)
                stopwatch.mark("warm-up")
        except StartupError as error:
            if self._draining is None:
                fail(self._boot, error)
            return
        if self._draining is None:
            self._gateway.phase = Phase.UP
        give_back()
        report_ready(self._boot)

    def _on_terminate(self) -> None:
        """Runs inside the signal handler."""
        if self._draining is not None:
            os._exit(EXIT_FORCED)
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._gateway.phase = Phase.DRAINING
        for stop in self._gateway.at_drain:
            stop()
        self._gateway.ring.closing = True
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        """Let running requests finish, abort those that take too long, then stop serving."""
        ring = self._gateway.ring
        log.info("Draining: %d requests are running.", ring.unfinished)
        if not await idle_within(ring, self._boot.config.drain_timeout):
            log.warning("Drain deadline: aborting %d requests.", ring.unfinished)
            ring.abort(Abort(abort_all=True, abort_message=ABORTED))
            if not await idle_within(ring, ABORT_GRACE_S):
                ring.end_all(ABORTED)
        await self._gateway.background.finish(ABORT_GRACE_S)
        self._server.should_exit = True


async def idle_within(ring: RingClient, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await ring.idle()
    except TimeoutError:
        return False
    return True


def fail(boot: Boot, error: StartupError) -> NoReturn:
    log.error("%s", error)
    report_ready(boot, str(error))
    os._exit(service.EXIT_STARTUP)


def with_level(record: logging.LogRecord) -> bool:
    """A filter that puts the level before uvicorn's lines, as before the access lines: operators' tools look for it."""
    record.msg = level_prefix(record) + record.msg
    return True


def health_timeout_s(environment: Mapping[str, str]) -> float:
    """How long /health_generate waits for its token. Raises StartupError."""
    value = environment.get(HEALTH_TIMEOUT_VARIABLE, "20")
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise StartupError(f"{HEALTH_TIMEOUT_VARIABLE} must be a number of seconds, got {value!r}")
    return seconds


async def serve(boot: Boot) -> None:
    """The whole life of the process."""
    config = boot.config
    if config.log_format == "text":
        uvicorn_log.addFilter(with_level)
    access_log.setLevel(config.access_log_level.upper())
    model = model_info.load(config)
    keys = processes(config.dp_size)
    readers = {title: ProgressReader(boot.run_dir, key) for title, key in keys.items()}
    newest = partial(newest_epoch, boot.run_dir)
    metrics = Metrics(config.name, newest, partial(pids, boot, readers), config.dp_size)
    least_attempt = boot.epoch * ATTEMPTS_OF_A_GATEWAY
    inbox, outbox = AsyncInbox(boot.inbox), AsyncOutbox(boot.outbox)
    ring = RingClient(
        inbox,
        outbox,
        config.max_inflight_requests,
        metrics,
        least_attempt,
        service.announced(boot),
        schedulers=config.dp_size,
        run_dir=boot.run_dir,
    )
    listening = asyncio.create_task(ring.listen())
    listening.add_done_callback(end_with_listener)
    beating = asyncio.create_task(beat(ring, ProgressWord(boot.run_dir, boot.role)))
    beating.add_done_callback(end_with_listener)
    if boot.epoch:
        payloads.remove_leftovers(boot.run_dir)
        await ring.introduce()
    facts = await ring.schedulers.facts()
    formats = detection.detect(config, model, template_sources(template_dir(model, config), config.chat_template))
    log.info("%s", formats)
    traces = tracer_of(config)
    gateway = Gateway(
        config=formats.applied(config),
        model=model,
        facts=facts,
        ring=ring,
        metrics=metrics,
        progress=SlowestProgress([reader for title, reader in readers.items() if title.startswith(SCHEDULER)]),
        hops={title: reader for title, reader in readers.items() if title != GATEWAY},
        run_dir=boot.run_dir,
        health_timeout_s=health_timeout_s(os.environ),
        tracer=traces,
    )
    gateway.files.open()
    ring.ask_facts()  # a command may have changed what they say while the gateway could not hear its reply
    await wait_until_connected(ring.probe)
    await GatewayServer(boot, gateway).serve()
    if traces is not None:
        await traces.close()


def tracer_of(config: ResolvedConfig) -> "OtlpTracer | None":
    """What sends traces; None without --otlp-traces-endpoint."""
    if config.otlp_traces_endpoint is None:
        return None
    from quartet.http_gateway.http.tracing import OtlpTracer  # an extra, and slow to import

    return OtlpTracer(config.otlp_traces_endpoint, config.otlp_traces_sample_ratio, config.name)


def pids(boot: Boot, readers: Mapping[str, ProgressReader]) -> dict[str, int]:
    """The processes of the server by title."""
    return {"launcher": boot.parent_pid} | {title: pid for title, reader in readers.items() if (pid := reader.pid())}


async def beat(ring: RingClient, progress: ProgressWord) -> None:
    """Show for ever that the event loop turns."""
    while True:
        progress.beat(busy=ring.unfinished > 0)
        await asyncio.sleep(IDLE_BEAT_S)


def end_with_listener(listening: "asyncio.Task[None]") -> None:
    """Without its listener the gateway is deaf: end it rather than let every client wait."""
    if not listening.cancelled():
        log.error("the ring's listener ended", exc_info=listening.exception())
        os._exit(1)


def main(boot: Boot) -> None:
    uvloop.run(serve(boot))


if __name__ == "__main__":
    service.run(main)
