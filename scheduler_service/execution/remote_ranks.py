"""Ranks on other machines: how they find rank 0, and how it notices their end.

Rank 0 listens at the address of --dist-init-addr, on a port of its own. That port and a token are in the store in which
all ranks meet, so whoever reaches the store can take part: it belongs on a private network. Each rank of another
machine connects and says who it is; from then on the connection is its channel.
"""

import logging
import os
import secrets
import select
import socket
import threading
from typing import NoReturn

import msgspec

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.scheduler_service.execution.rank_messages import Channel, Hello
from quartet.scheduler_service.host.parallel import LOST, TIMEOUT, Store

log = logging.getLogger(__name__)

PORT, TOKEN = "quartet/port", "quartet/token"
HELLO_BYTES = 256
HELLO_S = 10.0  # for the first message of a connection
SILENT_S, PROBE_S, PROBES = 10, 5, 3  # a machine that does not answer is noticed after about 25 s
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
    token, found = secrets.token_hex(16), dict[int, Channel]()
    with listener:
        store.set(TOKEN, token)
        store.set(PORT, str(listener.getsockname()[1]))
        log.info("Waiting for %d ranks on other machines.", len(ranks))
        listener.settimeout(TIMEOUT.total_seconds())
        while len(found) < len(ranks):
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                absent = ABSENT.format(config.nnodes, len(found), len(ranks), TIMEOUT.total_seconds())
                raise StartupError(absent) from error
            if (rank := greeted(connection, token)) in ranks:
                found[rank] = Channel(connection)
            else:
                connection.close()
    for rank, channel in found.items():
        threading.Thread(target=watch, args=(rank, channel.connection), name=f"rank {rank}", daemon=True).start()
    return [found[rank] for rank in ranks]


def greeted(connection: socket.socket, token: str) -> int:
    """The rank that has connected; -1 where the connection is not a rank's."""
    connection.settimeout(HELLO_S)
    try:
        hello = Channel(connection).receive(HELLO_BYTES)
    except (OSError, msgspec.MsgspecError):  # it said nothing, or no message
        return -1
    connection.settimeout(None)
    keep_alive(connection)
    if not (isinstance(hello, Hello) and secrets.compare_digest(hello.token.encode(), token.encode())):
        return -1
    return hello.rank


def connect(store: Store, rank: int, host: str) -> Channel:
    """This rank's channel to rank 0, on another machine. Waits for it. Raises StartupError."""
    try:
        port, token = int(store.get(PORT)), store.get(TOKEN).decode()
        connection = socket.create_connection((host, port), timeout=HELLO_S)
    except (OSError, RuntimeError) as error:
        raise StartupError(f"rank 0 at {host} cannot be reached: {error}") from error
    connection.settimeout(None)
    keep_alive(connection)
    channel = Channel(connection)
    channel.send(Hello(rank, token))
    return channel


def keep_alive(connection: socket.socket) -> None:
    """Send small messages at once, and have a machine that is gone noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (SILENT_S + PROBE_S * PROBES) * 1000)


def watch(rank: int, connection: socket.socket) -> NoReturn:
    """End this process, and so the group, when a rank on another machine has ended."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)  # errors and hang-ups are told anyway
    poll.poll()
    log.critical("Rank %d on another machine has ended. Ending the group.", rank)
    os._exit(LOST)
