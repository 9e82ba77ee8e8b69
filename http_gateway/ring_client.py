"""The gateway's end of the ring: requests go out, their text comes back; commands go out, replies come back.

One listener task reads the inbox and never waits for anybody: what arrives for a request is put into the mailbox of
its Flight, and the endpoint takes all of it at once when it gets to run, so a slow client costs memory for its own
text and nothing else. A rid stays pending until its terminal message has passed, even when its client has gone, so a
rid can never name two requests inside the ring.

When a process of the ring was started again, what may have been lost with the one before is sent once more, as the next
attempt (`http_gateway/journal.py`). `attempt` counts those restarts, for new requests too: a rid that is used again
can not be taken for what is left of an earlier one.
"""

import asyncio
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from http_gateway.flight import Flight
from http_gateway.journal import GUILTY, Pending, Quarantine
from runtime.control import Abort, ControlCommand, Probe
from runtime.errors import Kind, RequestError
from runtime.messages import ABORTED, Facts, Finish, Generate, Message, Reply, Restarted, Text, Tokens
from runtime.sockets import FrameTooLarge

log = logging.getLogger(__name__)

# Receiving a frame that is there already does not give way to the endpoints; after so many they get their turn. When
# the gateway falls behind, about so many steps of a request become one chunk of its stream.
FRAMES_A_TURN = 8

LAP_TIMEOUT_S = 5.0
INTRODUCE_AGAIN_S = 5.0
RELAYED_ABORTS = 1024  # the last ones, kept in case the tokenizer dies with them
COMMAND_LOST = (
    "The scheduler was started again while the command was under way: whether it has taken effect is not known. "
    "See /get_model_info, and send it again."
)


class Receiver(Protocol):
    async def recv(self) -> list[Any]: ...


class Sender(Protocol):
    def send(self, messages: Sequence[Message]) -> None: ...


class Meter(Protocol):
    """What the gateway counts of each request (http_gateway/metrics.py)."""

    def heard(self, pending: Pending, text: Text, now: float) -> None: ...

    def restarted(self, role: str) -> None: ...


class RingClient:
    """Owns everything that is on its way round the ring."""

    def __init__(self, inbox: Receiver, outbox: Sender, limit: int, meter: Meter) -> None:
        self.closing = False  # no new requests: the server drains
        self.stale = 0  # messages for nobody: an old attempt, or a request that has ended
        self.last_heard_at = 0.0
        self.on_reply: Callable[[Reply], None] = lambda reply: None  # hears them all, those for nobody too
        self.on_facts: Callable[[Facts], None] = lambda facts: None  # hears those of a restarted scheduler
        self._inbox = inbox
        self._outbox = outbox
        self._limit = limit
        self._meter = meter
        self._pending: dict[str, Pending] = {}
        self._attempt = 0  # restarts of ring processes so far
        self._quarantine = Quarantine()
        self._relayed: deque[Abort] = deque(maxlen=RELAYED_ABORTS)
        self._waiting: dict[str, tuple[ControlCommand, asyncio.Future[Message]]] = {}  # commands by id
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
            Restarted: self._on_restarted,
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
        flight = Flight([generate.request.rid for generate in batch], self._abandon)
        entries = []
        for index, generate in enumerate(batch):
            parent = parents[index] if parents else ""
            entries.append(Pending(generate, parent, flight, index, time.monotonic(), self._attempt))
        if self._quarantine.alone is None:
            self._send([entry.message() for entry in entries])
            for entry in entries:
                entry.in_ring = True
        self._pending.update((entry.request.rid, entry) for entry in entries)
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
        """Raises RequestError for what cannot be sent."""
        try:
            self._outbox.send(messages)
        except FrameTooLarge as error:
            raise RequestError(f"The request is too large: {error}.", Kind.TOO_LARGE) from error
        except OverflowError as error:  # an integer of more than 64 bits
            raise RequestError("A number in the request is out of range.") from error

    def _abandon(self, flight: Flight) -> None:
        left = [entry for rid in flight.rids if (entry := self._pending.get(rid)) and entry.flight is flight]
        for entry in left:
            entry.flight = None
        self._unwant([(entry, Abort(rid=entry.request.rid, abort_message=ABORTED)) for entry in left])

    def _unwant(self, aborts: list[tuple[Pending, Abort]]) -> None:
        """End requests: here what is not in the ring, else in the scheduler."""
        on_the_way = []
        for entry, abort in aborts:
            entry.unwanted = abort
            if entry.in_ring:
                on_the_way.append(abort)
            else:
                self._end(entry, aborted(abort))
        self._send_aborts(on_the_way)

    def _send_aborts(self, aborts: list[Abort]) -> None:
        if aborts:
            self._outbox.send(aborts)

    def abort(self, command: Abort) -> int:
        """Abort one rid (with the requests made from it), all that begin with it, or all; how many were found."""
        found = [entry for entry in self._pending.values() if _names(command, entry)]
        message = command.abort_message
        self._unwant([(entry, Abort(rid=entry.request.rid, abort_message=message)) for entry in found])
        return len(found)

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
        for entry in list(self._pending.values()):
            self._end(entry, Finish(reason="abort", message=message))

    def _end(self, entry: Pending, finish: Finish) -> None:
        """Finish one request here and now."""
        tokens = Tokens(rid=entry.request.rid, attempt=entry.attempt, finish=finish)
        self._on_text(Text(tokens=tokens), time.monotonic())

    # restarts

    async def introduce(self) -> None:
        """Say that this gateway is new, until the scheduler has said its facts."""
        while not self._facts.done():
            self._outbox.send([Restarted(role="gateway")])
            await asyncio.wait([self._facts], timeout=INTRODUCE_AGAIN_S)

    def _on_restarted(self, restarted: Restarted, now: float) -> None:
        self._recover(restarted.role)

    def _recover(self, role: str) -> None:
        """A service was started again: send once more what may have been lost with the one before."""
        self._attempt += 1
        self._meter.restarted(role)
        forgotten = role == "scheduler"  # it knows nothing any more, so there is nothing to abort
        aborts = [] if forgotten else [abort for abort in self._relayed if abort.rid not in self._pending]
        lost = [entry for entry in self._pending.values() if role != "tokenizer" or not entry.last_heard_at]
        guilty = self._quarantine.died(role, lost)
        for entry in lost:
            entry.in_ring, entry.attempt = False, self._attempt
        for entry in list(self._pending.values()):
            if entry.unwanted or entry is guilty:
                aborts.append(Abort(rid=entry.request.rid))
                blamed = Finish.internal(GUILTY.format(role=role))
                self._end(entry, aborted(entry.unwanted) if entry.unwanted else blamed)
        if not forgotten:
            self._send_aborts(aborts)
        self._recover_commands(forgotten)
        again = self._pump()
        log.warning("The %s was started again; %d of %d requests are sent again.", role, again, len(self._pending))

    def _recover_commands(self, forgotten: bool) -> None:
        """Commands go again, and a scheduler that has seen one knows it; those that a dead one had fail."""
        for command, answer in self._waiting.values():
            if not forgotten:
                self._outbox.send([command])
            elif not answer.done():
                answer.set_exception(RequestError(COMMAND_LOST, Kind.UNAVAILABLE))

    def _pump(self) -> int:
        """Send what is not in the ring and may be; how many that were."""
        if self._quarantine.alone is None:
            self._quarantine.advance(self._pending.values())
        sent = 0
        for entry in list(self._pending.values()):
            if entry.in_ring or entry.unwanted or not self._quarantine.admits(entry):
                continue
            try:
                self._send([entry.message()])
            except RequestError as error:  # with its output it has become too large
                self._end(entry, Finish.failed(error))
                continue
            entry.in_ring = True
            sent += 1
        return sent

    # commands

    async def command(self, command: ControlCommand, timeout_s: float) -> Message:
        """Send a command round the ring and wait for what comes back. Raises TimeoutError and RequestError."""
        self._next_command += 1
        command.id = f"{os.getpid()}.{self._next_command}"  # a gateway that is started again counts afresh
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[command.id] = command, answer
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
            except TimeoutError:
                log.info("the ring is not complete yet")

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
        ended = text.tokens.finish is not None
        if ended:
            del self._pending[text.tokens.rid]
            self._check_idle()
        entry.delivered += text.tokens.ids
        if entry.last_heard_at:
            text.tokens.cached_tokens = entry.cached_tokens  # those of its first attempt
        if text.tokens.prompt_tokens:
            entry.prompt_tokens, entry.cached_tokens = text.tokens.prompt_tokens, text.tokens.cached_tokens
        self._meter.heard(entry, text, now)
        entry.last_heard_at = now
        if entry.flight is not None:
            entry.flight.put(entry.index, text)
        if self._quarantine.clears(entry, ended):
            self._pump()

    def _on_answer(self, answer: Reply | Probe, now: float) -> None:
        if isinstance(answer, Reply):
            self.on_reply(answer)
        _, waiting = self._waiting.get(answer.id, (None, None))
        if waiting is None or waiting.done():
            self.stale += 1
            return
        waiting.set_result(answer)

    def _on_facts(self, facts: Facts, now: float) -> None:
        if not self._facts.done():
            self._facts.set_result(facts)
        elif facts.epoch != self._facts.result().epoch:
            self._facts = asyncio.get_running_loop().create_future()
            self._facts.set_result(facts)
            self.on_facts(facts)
            self._recover("scheduler")

    def _on_abort(self, abort: Abort, now: float) -> None:
        """The detokenizer has met a stop string: the scheduler, further on in the ring, is to end the request."""
        self._relayed.append(abort)
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


def aborted(abort: Abort) -> Finish:
    return Finish(reason="abort", message=abort.abort_message or ABORTED)


def _names(command: Abort, entry: Pending) -> bool:
    """Does the command mean this request?"""
    if command.abort_all:
        return True
    if not command.rid:
        return False
    if command.prefix:
        return entry.request.rid.startswith(command.rid) or entry.parent.startswith(command.rid)
    return command.rid in (entry.request.rid, entry.parent)
