"""The gateway's end of the ring: requests go out, their text comes back; commands go out, replies come back.

One listener task reads the inbox and never waits for anybody: what arrives for a request is put into the mailbox of
its Flight, and the endpoint takes all of it at once when it gets to run, so a slow client costs memory for its own
text and nothing else. `Pending` is the journal: for every unfinished request it keeps what is needed to send it again
after a ring process was restarted. A rid stays pending until its terminal message has passed, even when its client
has gone, so a rid can never name two requests inside the ring.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import msgspec

from runtime.control import Abort, ControlCommand, Probe
from runtime.errors import Kind, RequestError
from runtime.messages import ABORTED, Facts, Finish, Generate, Message, Reply, Request, Text, Tokens
from runtime.sockets import FrameTooLarge

log = logging.getLogger(__name__)

# Receiving a frame that is there already does not give way to the endpoints; after so many they get their turn. When
# the gateway falls behind, about so many steps of a request become one chunk of its stream.
FRAMES_A_TURN = 8

LAP_TIMEOUT_S = 5.0
LAP_RETRY_S = 0.01

Delivery = tuple[int, Text]  # (index of the request in its flight, one step of it)


class ClientGone(Exception):
    """The client has closed its connection; nobody is left to answer."""


class Receiver(Protocol):
    async def recv(self) -> list[Any]: ...


class Sender(Protocol):
    def send(self, messages: Sequence[Message]) -> bool: ...


class Meter(Protocol):
    """What the gateway counts of each request (http_gateway/metrics.py)."""

    def heard(self, pending: "Pending", text: Text, now: float) -> None: ...


@dataclass(slots=True, eq=False)
class Pending:
    """The journal entry of one unfinished request."""

    generate: Generate
    parent: str  # the rid that the client gave, where the request is one of several made from it
    flight: "Flight | None"  # None: its client has gone, only the terminal message is awaited
    index: int
    sent_at: float
    attempt: int = 0
    delivered: bytearray = field(default_factory=bytearray)  # output ids handed to the endpoint, int32
    last_heard_at: float = 0.0  # 0: nothing yet
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def request(self) -> Request:
        return self.generate.request


class Flight:
    """Requests sent together and the mailbox of what comes back. Leaving the `with` block aborts what still runs."""

    def __init__(self, rids: list[str], abandon: Callable[["Flight"], None]) -> None:
        self.rids = rids
        self._abandon = abandon
        self._mail: list[Delivery] = []
        self._running = len(rids)
        self._waiter: asyncio.Future[None] | None = None
        self._client_gone = False

    def __enter__(self) -> "Flight":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._running:
            self._abandon(self)

    @property
    def finished(self) -> bool:
        """Every request has ended and everything it produced was taken."""
        return not self._running and not self._mail

    async def next(self) -> list[Delivery]:
        """All that has arrived since the last call, at least one delivery. Raises ClientGone."""
        while not self._mail and not self._client_gone:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._client_gone:
            raise ClientGone
        mail, self._mail = self._mail, []
        return mail

    def leave(self) -> None:
        """The client has gone: wake whoever waits in `next`."""
        self._client_gone = True
        self._wake()

    def put(self, index: int, text: Text) -> None:
        self._mail.append((index, text))
        self._running -= text.tokens.finish is not None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class RingClient:
    """Owns everything that is on its way round the ring."""

    def __init__(self, inbox: Receiver, outbox: Sender, limit: int, meter: Meter) -> None:
        self.closing = False  # no new requests: the server drains
        self.stale = 0  # messages for nobody: an old attempt, or a request that has ended
        self.last_heard_at = 0.0
        self.on_reply: Callable[[Reply], None] = lambda reply: None  # hears them all, those for nobody too
        self._inbox = inbox
        self._outbox = outbox
        self._limit = limit
        self._meter = meter
        self._pending: dict[str, Pending] = {}
        self._waiting: dict[str, asyncio.Future[Message]] = {}  # commands by id
        self._next_command = 0
        self._facts: asyncio.Future[Facts] = asyncio.get_running_loop().create_future()
        self._idle = asyncio.Event()
        self._idle.set()
        self._receive: dict[type, Callable[[Any, float], None]] = {
            Text: self._on_text,
            Reply: self._on_answer,
            Probe: self._on_answer,
            Facts: self._on_facts,
            Abort: self._on_abort,
        }

    # requests

    def open(self, batch: list[Generate], parents: list[str] | None = None, *, limited: bool = True) -> Flight:
        """Send requests in one frame. Raises RequestError: draining, too many in flight, a rid in use, too large.

        `parents` are the rids by which the client knows them, where those differ from their own. The limit of what
        may be in flight is for clients; the gateway's own requests are not `limited`.
        """
        self._admit(batch)
        if limited:
            self._check_room(batch)
        self._send(batch)
        now = time.monotonic()
        flight = Flight([generate.request.rid for generate in batch], self._abandon)
        for index, generate in enumerate(batch):
            parent = parents[index] if parents else ""
            self._pending[generate.request.rid] = Pending(generate, parent, flight, index, now)
        self._idle.clear()
        return flight

    def _admit(self, batch: list[Generate]) -> None:
        if self.closing:
            raise RequestError("The server is shutting down.", Kind.UNAVAILABLE)
        for generate in batch:
            if generate.request.rid in self._pending:
                raise RequestError(f"Duplicate request ID detected: {generate.request.rid}", field="rid")

    def _check_room(self, batch: list[Generate]) -> None:
        if len(batch) > self._limit:
            raise RequestError(f"One call may hold at most {self._limit} requests, got {len(batch)}.")
        if len(self._pending) + len(batch) > self._limit:
            raise RequestError(
                f"The server is full: {len(self._pending)} of at most {self._limit} requests are in flight.",
                Kind.UNAVAILABLE,
            )

    def _send(self, messages: Sequence[Message]) -> None:
        try:
            sent = self._outbox.send(messages)
        except FrameTooLarge as error:
            raise RequestError(f"The request is too large: {error}.", Kind.TOO_LARGE) from error
        except OverflowError as error:  # an integer of more than 64 bits
            raise RequestError("A number in the request is out of range.") from error
        if not sent:
            raise RequestError("The tokenizer is not connected.", Kind.UNAVAILABLE)

    def _abandon(self, flight: Flight) -> None:
        left = [entry for rid in flight.rids if (entry := self._pending.get(rid)) and entry.flight is flight]
        for entry in left:
            entry.flight = None
        self._send_aborts([Abort(rid=entry.request.rid, abort_message=ABORTED) for entry in left])

    def _send_aborts(self, aborts: list[Abort]) -> None:
        if aborts and not self._outbox.send(aborts):
            log.warning("could not abort %d requests: the tokenizer is not connected", len(aborts))

    def abort(self, command: Abort) -> int:
        """Abort one rid (with the requests made from it), all that begin with it, or all; how many were found."""
        found = [entry.request.rid for entry in self._pending.values() if _names(command, entry)]
        self._send_aborts([Abort(rid=rid, abort_message=command.abort_message) for rid in found])
        return len(found)

    def resend(self) -> int:
        """Send every unfinished request again, to go on behind what was delivered; the ring forgot it in a restart."""
        self._pending = {rid: entry for rid, entry in self._pending.items() if entry.flight is not None}
        for entry in self._pending.values():
            entry.attempt += 1
        again = [_continued(entry) for entry in self._pending.values()]
        if again:
            self._send(again)
        self._check_idle()
        return len(again)

    @property
    def unfinished(self) -> int:
        return len(self._pending)

    @property
    def oldest_sent_at(self) -> float | None:
        return next((entry.sent_at for entry in self._pending.values()), None)

    async def idle(self) -> None:
        """Return once nothing is pending."""
        await self._idle.wait()

    def end_all(self, message: str) -> None:
        """Finish every pending request here and now, without the ring."""
        finish = Finish(reason="abort", message=message)
        now = time.monotonic()
        for entry in list(self._pending.values()):
            self._on_text(Text(tokens=Tokens(rid=entry.request.rid, attempt=entry.attempt, finish=finish)), now)

    # commands

    async def command(self, command: ControlCommand, timeout_s: float) -> Message:
        """Send a command round the ring and wait for what comes back. Raises TimeoutError and RequestError."""
        self._next_command += 1
        command.id = str(self._next_command)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[command.id] = answer
        try:
            self._send([command])
            async with asyncio.timeout(timeout_s):
                return await answer
        finally:
            del self._waiting[command.id]

    async def probe(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """The counters of every hop, by role. Raises TimeoutError and RequestError."""
        answer = await self.command(Probe(), timeout_s)
        return answer.counters if isinstance(answer, Probe) else {}

    async def facts(self) -> Facts:
        """What the loaded model allows; waits until the scheduler has said it."""
        return await asyncio.shield(self._facts)

    async def lap(self) -> None:
        """Wait until a probe has gone all the way round: every hop is there and connected to the next."""
        while True:
            try:
                await self.probe(LAP_TIMEOUT_S)
                return
            except (RequestError, TimeoutError):
                await asyncio.sleep(LAP_RETRY_S)

    # what arrives

    async def listen(self) -> None:
        """Deliver everything that arrives, for ever."""
        for frame in itertools.count(1):
            messages = await self._inbox.recv()
            now = self.last_heard_at = time.monotonic()
            for message in messages:
                self._receive.get(type(message), self._on_other)(message, now)
            if frame % FRAMES_A_TURN == 0:
                await asyncio.sleep(0)

    def _on_text(self, text: Text, now: float) -> None:
        entry = self._pending.get(text.tokens.rid)
        if entry is None or entry.attempt != text.tokens.attempt:
            self.stale += 1
            return
        if text.tokens.finish is not None:
            del self._pending[text.tokens.rid]
            self._check_idle()
        entry.delivered += text.tokens.ids
        if text.tokens.prompt_tokens:
            entry.prompt_tokens, entry.cached_tokens = text.tokens.prompt_tokens, text.tokens.cached_tokens
        self._meter.heard(entry, text, now)
        entry.last_heard_at = now
        if entry.flight is not None:
            entry.flight.put(entry.index, text)

    def _on_answer(self, answer: Reply | Probe, now: float) -> None:
        if isinstance(answer, Reply):
            self.on_reply(answer)
        waiting = self._waiting.get(answer.id)
        if waiting is None or waiting.done():
            self.stale += 1
            return
        waiting.set_result(answer)

    def _on_facts(self, facts: Facts, now: float) -> None:
        if self._facts.done():
            self._facts = asyncio.get_running_loop().create_future()
        self._facts.set_result(facts)

    def _on_abort(self, abort: Abort, now: float) -> None:
        """The detokenizer has met a stop string: the scheduler, further on in the ring, is to end the request."""
        self._send_aborts([abort])

    def _on_other(self, message: Message, now: float) -> None:
        """Something went all the way round and no hop took it: a command is refused, the rest is a fault."""
        if isinstance(message, ControlCommand):
            name = type(message).__struct_config__.tag
            self._on_answer(Reply(id=message.id, success=False, status=400, message=f"{name} is not supported."), now)
            return
        log.error("a %s message came back to the gateway; no service took it", type(message).__name__)

    def _check_idle(self) -> None:
        if not self._pending:
            self._idle.set()


def _names(command: Abort, entry: Pending) -> bool:
    """Does the command mean this request?"""
    if command.abort_all:
        return True
    if not command.rid:
        return False
    if command.prefix:
        return entry.request.rid.startswith(command.rid) or entry.parent.startswith(command.rid)
    return command.rid in (entry.request.rid, entry.parent)


def _continued(entry: Pending) -> Generate:
    request = msgspec.structs.replace(entry.request, attempt=entry.attempt, resume_ids=bytes(entry.delivered))
    return msgspec.structs.replace(entry.generate, request=request)
