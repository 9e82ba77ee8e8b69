"""The ring's sockets: PUSH → PULL over ipc, a list of messages per frame. The only file that knows zmq.

Receivers bind, senders connect. Every incarnation of a service binds a path of its own, `<role>.<epoch>`, so that none
takes the traffic of another; senders connect to the stable path `<role>`, a link that the launcher points to the
newest. Senders use
IMMEDIATE, so that they wait while no peer exists; the gateway, which must not wait, lets frames queue instead. What a
peer had not handled when it died is gone with it (`http_gateway/ring/journal.py` sends it again). Inner queues have no
bound; the gateway's in-flight limit is what bounds the ring. Hostile bytes raise nothing out of `recv`: they are
counted in `Inbox.rejected`, logged once a minute, and dropped; of a frame only the messages that are wrong.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from quartet.runtime.control import Command
from quartet.runtime.guard import end_of
from quartet.runtime.limits import MAX_IPC_MESSAGE_BYTES
from quartet.runtime.messages import Finish, Message, Reply, RingMessage, Tokens

log = logging.getLogger(__name__)

SocketError = zmq.ZMQError

IPC_PATH_MAX = 107  # bytes, sun_path without its terminator
RECONNECT_MS = 10  # between two tries to reach a service that is being started again
WAIT_MS = 1000
REPORT_EVERY_S = 60.0
LOGGED_CHARS = 200  # of an error
TOO_LARGE = "The request's data is too large for the server: {}."
UNDECODABLE = (ValueError, RecursionError)  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
UNREADABLE = b"?"  # the ids of a message that could not be decoded: no guard lets them pass
NOT_READABLE = "Internal error: the command could not be decoded."
NOT_SENDABLE = "Internal error: what the request has led to cannot be sent ({})."

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[RingMessage | Command])
_one: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(RingMessage | Command)
_parts: msgspec.msgpack.Decoder[list[msgspec.Raw]] = msgspec.msgpack.Decoder(list[msgspec.Raw])
_anything = msgspec.msgpack.Decoder()


class FrameTooLarge(ValueError):
    """A frame exceeds MAX_IPC_MESSAGE_BYTES; the receiver would drop the connection, so it is not sent."""


def encode(messages: Sequence[Message], limit_bytes: int = MAX_IPC_MESSAGE_BYTES) -> bytes:
    """One frame. Raises FrameTooLarge."""
    frame = _encoder.encode(messages)
    if len(frame) > limit_bytes:
        raise FrameTooLarge(f"frame of {len(frame)} bytes, at most {limit_bytes} are sent")
    return frame


def frames(messages: Sequence[Message], limit_bytes: int = MAX_IPC_MESSAGE_BYTES) -> Iterator[bytes]:
    """As few frames as the size limit allows. A message that cannot be sent alone gives way to its request's end."""
    try:
        yield encode(messages, limit_bytes)
    except (ValueError, OverflowError, TypeError, RecursionError) as error:  # too large; lone surrogates; and the like
        if len(messages) > 1:
            half = len(messages) // 2
            yield from frames(messages[:half], limit_bytes)
            yield from frames(messages[half:], limit_bytes)
            return
        log.error("a %s message cannot be sent: %s", type(messages[0]).__name__, str(error)[:LOGGED_CHARS])
        large = isinstance(error, FrameTooLarge)
        reason = TOO_LARGE.format(error) if large else NOT_SENDABLE.format(type(error).__name__)
        if ending := end_of(messages[0], Finish.internal(reason)):
            yield encode([ending])


def decode(frame: bytes) -> list[Any]:
    """The messages of one frame. Raises ValueError or RecursionError on anything that is not such a frame."""
    return _decoder.decode(frame)


def endpoint(run_dir: str, key: str, epoch: int) -> str:
    """What one incarnation of a process binds, by its key. Raises ValueError: the path is too long for a socket."""
    path = f"{run_dir}/{key}.{epoch}"
    if len(path.encode()) > IPC_PATH_MAX:
        raise ValueError(f"socket path {path!r} is longer than {IPC_PATH_MAX} bytes; set a shorter XDG_RUNTIME_DIR")
    return f"ipc://{path}"


def stable_path(run_dir: str, role: str) -> str:
    """The path that senders to a role connect to; the same for every incarnation."""
    return f"ipc://{run_dir}/{role}"


def point_stable_path(run_dir: str, role: str, epoch: int) -> None:
    """Make the stable path of a role a link to this incarnation, which need not exist yet."""
    link, fresh = Path(run_dir) / role, Path(run_dir) / f"{role}.link"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(f"{role}.{epoch}")
    fresh.replace(link)


def newest_epoch(run_dir: str, role: str) -> int:
    """The epoch of the last incarnation of a role that the launcher has started; 0 where there was none."""
    try:
        return int((Path(run_dir) / role).readlink().suffix[1:])
    except (OSError, ValueError):  # nothing was started there
        return 0


def is_open(run_dir: str, role: str) -> bool:
    """Whether the newest incarnation of a role takes messages; while it starts it does not."""
    return (Path(run_dir) / role).exists()


def _pull(context: Any, address: str) -> Any:
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_IPC_MESSAGE_BYTES)
    socket.bind(address)
    return socket


def _push(context: Any, address: str, immediate: bool) -> Any:
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.IMMEDIATE, immediate)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.connect(address)
    return socket


class _Gate:
    """Decodes frames; counts and drops the ones that are not ours."""

    def __init__(self) -> None:
        self.rejected = 0
        self._reported_at = -REPORT_EVERY_S

    def open(self, frame: bytes) -> list[Any]:
        """The frame's messages. In the place of one that cannot be decoded stands what ends its request."""
        try:
            return decode(frame)
        except UNDECODABLE as error:
            self._reject(frame, error)
        try:
            return [message for part in _parts.decode(frame) for message in self._open_part(part)]
        except UNDECODABLE:
            return []

    def _open_part(self, part: bytes) -> list[Any]:
        try:
            return [_one.decode(part)]
        except UNDECODABLE:
            return unreadable(part)

    def _reject(self, frame: bytes, error: Exception) -> None:
        self.rejected += 1
        if time.monotonic() - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = time.monotonic()
            shown = repr(str(error)[:LOGGED_CHARS])
            log.error("a malformed frame of %d bytes (%d so far): %s", len(frame), self.rejected, shown)


def unreadable(part: bytes) -> list[Message]:
    """What ends the request or the command that a message names which is of no type of ours."""
    try:
        found = _anything.decode(part)
        if not isinstance(found, dict):
            return []
        named = next((found[key] for key in ("request", "tokens") if isinstance(found.get(key), dict)), found)
        match named:
            case {"rid": str(rid), **rest}:
                attempt = rest.get("attempt", 0)
                return [Tokens(rid=rid, attempt=attempt if isinstance(attempt, int) else 0, ids=UNREADABLE)]
            case {"id": str(id), **rest}:
                rank = rest.get("rank", 0)
                rank = rank if isinstance(rank, int) else 0
                return [Reply(id=id, rank=rank, success=False, status=500, message=NOT_READABLE)]
    except UNDECODABLE:
        pass  # it names nobody
    return []


class Inbox:
    """Blocking receiver of a service."""

    def __init__(self, address: str) -> None:
        self._socket = _pull(zmq.Context.instance(), address)
        self._gate = _Gate()
        self._timeout_ms = -1  # of the socket

    @property
    def rejected(self) -> int:
        return self._gate.rejected

    def recv(self, timeout_s: float | None = 0.0) -> list[Any]:
        """All messages of the frames that wait, in order. Blocks up to timeout_s for the first; None = for ever."""
        messages: list[Any] = []
        while (frame := self._next(timeout_s)) is not None:
            messages += self._gate.open(frame)
            timeout_s = 0.0
        return messages

    def _next(self, timeout_s: float | None) -> bytes | None:
        """The next frame, or None after the timeout. Without pyzmq's `poll`, which takes as long as all the rest."""
        timeout_ms = -1 if timeout_s is None else int(timeout_s * 1000)
        if timeout_ms and timeout_ms != self._timeout_ms:
            self._socket.rcvtimeo = self._timeout_ms = timeout_ms
        try:
            frame: bytes = self._socket.recv(0 if timeout_ms else zmq.DONTWAIT)
            return frame
        except zmq.Again:
            return None

    def close(self) -> None:
        self._socket.close()


class Outbox:
    """Blocking sender of a service; blocks only while no peer is connected. What is too large is split."""

    def __init__(self, address: str, on_wait: Callable[[], None] = lambda: None, *, waits: bool = True) -> None:
        """`on_wait` is called once a second while there is no peer. Not `waits`: frames are kept for it instead."""
        self._socket = _push(zmq.Context.instance(), address, immediate=waits)
        self._on_wait = on_wait

    def send(self, messages: Sequence[Message]) -> None:
        if messages:
            for frame in frames(messages):
                self._send(frame)

    def _send(self, frame: bytes) -> None:
        while True:
            try:
                self._socket.send(frame, zmq.DONTWAIT)
                return
            except zmq.Again:
                self._on_wait()
                self._socket.poll(WAIT_MS, zmq.POLLOUT)

    def close(self) -> None:
        self._socket.close()


class AsyncInbox:
    """Receiver inside an event loop (the gateway). Not zmq.asyncio's, which takes twice as long for a frame."""

    def __init__(self, address: str) -> None:
        self._socket = _pull(zmq.Context.instance(), address)
        self._gate = _Gate()
        self._loop: asyncio.AbstractEventLoop | None = None  # that watches the socket
        self._changed = asyncio.Event()

    @property
    def rejected(self) -> int:
        return self._gate.rejected

    async def recv(self) -> list[Any]:
        """The messages of the next frame."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.FD, self._changed.set)
        while True:
            self._changed.clear()  # before the look: the socket tells once only of what comes after it
            try:
                return self._gate.open(self._socket.recv(zmq.DONTWAIT))
            except zmq.Again:
                await self._changed.wait()

    def close(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.FD)
        self._socket.close()


class AsyncOutbox:
    """Sender inside an event loop; never waits: while no peer is connected, frames are kept for it."""

    def __init__(self, address: str) -> None:
        self._socket = _push(zmq.Context.instance(), address, immediate=False)

    def send(self, messages: Sequence[Message]) -> None:
        """Queue one frame."""
        self._socket.send(encode(messages), zmq.DONTWAIT)

    def close(self) -> None:
        self._socket.close()
