"""Ranks on other machines: how they find rank 0, and how it notices their end and their silence.

Rank 0 listens at the address of --dist-init-addr, on a port of its own. That port and a token are in the store in which
all ranks meet, so whoever reaches the store can take part: it belongs on a private network. Each rank of another
machine connects and says who it is; from then on the connection is its channel. On a second one it sends a byte a
second: a process that is stopped, or whose machine is, keeps its connections and says nothing.
"""

import contextlib
import logging
import os
import secrets
import select
import socket
import threading
import time
from typing import NoReturn

import msgspec

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.process.progress import PULSE_S
from quartet.scheduler_service.execution.rank_messages import Channel, Hello
from quartet.scheduler_service.host.parallel import LOST, TIMEOUT, Store

log = logging.getLogger(__name__)

PORT, TOKEN = "quartet/port", "quartet/token"
HELLO_BYTES = 256
HELLO_S = 10.0  # for the first message of a connection
SILENT_S, PROBE_S, PROBES = 10, 5, 3  # a machine that does not answer is noticed after about 25 s
PULSE, LOOK_S = b"p", 0.5
SILENT = "Rank %d on another machine has not answered for %.0f s (--watchdog-timeout). Ending the group."
ABSENT = "--nnodes {}: only {} of {} ranks on other machines have come within {:.0f} s"


def listen(config: ResolvedConfig) -> socket.socket:
    """Where ranks on other machines connect. Raises StartupError, before anybody waits."""
    host = str(config.dist_init_addr).rsplit(":", 1)[0]
    try:
        return socket.create_server((host, 0))
    except OSError as error:
        raise StartupError(f"--dist-init-addr {host} is no address of this machine: {error.strerror}") from error


def wait_for(store: Store, config: ResolvedConfig, listener: socket.socket) -> list[Channel]:
    """The channels of the ranks on other machines, in their order. Raises StartupError."""
    ranks = range(config.ranks_here, config.tp_size)
    token, found, pulses = secrets.token_hex(16), dict[int, Channel](), dict[int, socket.socket]()
    with listener:
        store.set(TOKEN, token)
        store.set(PORT, str(listener.getsockname()[1]))
        log.info("Waiting for %d ranks on other machines.", len(ranks))
        listener.settimeout(TIMEOUT.total_seconds())
        while min(len(found), len(pulses)) < len(ranks):
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                absent = ABSENT.format(config.nnodes, len(found), len(ranks), TIMEOUT.total_seconds())
                raise StartupError(absent) from error
            hello = greeted(connection, token)
            if hello is None or hello.rank not in ranks:
                connection.close()
            elif hello.pulses:
                pulses[hello.rank] = connection
            else:
                found[hello.rank] = Channel(connection)
    for rank, channel in found.items():
        silence = Silence(rank, pulses[rank], config.watchdog_timeout)
        watched = rank, channel.connection, silence
        threading.Thread(target=watch, args=watched, name=f"rank {rank}", daemon=True).start()
    return [found[rank] for rank in ranks]


def greeted(connection: socket.socket, token: str) -> Hello | None:
    """What a rank that has connected says; None where the connection is not a rank's."""
    connection.settimeout(HELLO_S)
    try:
        hello = Channel(connection).receive(HELLO_BYTES)
    except (OSError, msgspec.MsgspecError):  # it said nothing, or no message
        return None
    connection.settimeout(None)
    keep_alive(connection)
    if not (isinstance(hello, Hello) and secrets.compare_digest(hello.token.encode(), token.encode())):
        return None
    return hello


def connect(store: Store, rank: int, host: str) -> Channel:
    """This rank's channel to rank 0, on another machine. Waits for it. Raises StartupError."""
    try:
        port, token = int(store.get(PORT)), store.get(TOKEN).decode()
        channel, pulses = (connected(host, port, Hello(rank, token, of)) for of in (False, True))
    except (OSError, RuntimeError) as error:
        raise StartupError(f"rank 0 at {host} cannot be reached: {error}") from error
    threading.Thread(target=send_pulses, args=(pulses.connection,), name="pulses", daemon=True).start()
    return channel


def connected(host: str, port: int, hello: Hello) -> Channel:
    """A connection to rank 0 that has said who it is. Raises OSError."""
    connection = socket.create_connection((host, port), timeout=HELLO_S)
    connection.settimeout(None)
    keep_alive(connection)
    channel = Channel(connection)
    channel.send(hello)
    return channel


def send_pulses(connection: socket.socket) -> None:
    """Show that this process runs, until rank 0 has ended: that is noticed on the channel."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(PULSE)
            time.sleep(PULSE_S)


def keep_alive(connection: socket.socket) -> None:
    """Send small messages at once, and have a machine that is gone noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (SILENT_S + PROBE_S * PROBES) * 1000)


class Silence:
    """How long a rank has sent no sign of life. Time in which nobody looked does not count: nothing ran here."""

    def __init__(self, rank: int, connection: socket.socket, limit_s: float) -> None:
        """`limit_s`: --watchdog-timeout; 0: none."""
        connection.setblocking(False)
        self._rank = rank
        self._connection = connection
        self._limit_s = limit_s
        self._silent_s = 0.0

    def look(self, passed_s: float) -> str:
        """What is wrong, so many seconds after the last look; empty: nothing."""
        try:
            alive = bool(self._connection.recv(1 << 12))  # none at its end, which the channel's tells too
        except OSError:  # there is nothing, or the connection is lost
            alive = False
        self._silent_s = 0.0 if alive else self._silent_s + min(passed_s, 2 * LOOK_S)
        return SILENT % (self._rank, self._silent_s) if 0 < self._limit_s < self._silent_s else ""


def watch(rank: int, connection: socket.socket, silence: Silence) -> NoReturn:
    """End this process, and so the group, when a rank on another machine has ended, or says nothing any more."""
    log.critical("%s", reason_to_end(rank, connection, silence))
    os._exit(LOST)


def reason_to_end(rank: int, connection: socket.socket, silence: Silence) -> str:
    """Wait until there is one."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)  # errors and hang-ups are told anyway
    looked_at = time.monotonic()
    while not poll.poll(LOOK_S * 1000):
        before, looked_at = looked_at, time.monotonic()
        if wrong := silence.look(looked_at - before):
            return wrong
    return f"Rank {rank} on another machine has ended. Ending the group."
