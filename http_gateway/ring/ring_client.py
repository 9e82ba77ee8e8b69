"""The gateway's end of the ring: requests go out, their text comes back; commands go out, replies come back.

One listener task reads the inbox and never waits for anybody: what arrives for a request is put into its
RequestGroup, and the endpoint takes all of it at once when it gets to run, so a slow client costs memory for its own
text and nothing else. A rid stays pending until its terminal message has passed, even when its client has gone, so a
rid can never name two requests inside the ring.

When a process of the ring was started again, what may have been lost with the one before is sent once more, as the next
attempt (`http_gateway/ring/journal.py`), in the order in which it was sent first, commands too. Attempts count those
restarts, for new requests as well: a rid that is used again cannot be taken for what is left of an earlier one.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from quartet.http_gateway.ring import death_watch
from quartet.http_gateway.ring.aborts import RelayedAborts, abort_finish, matches
from quartet.http_gateway.ring.admission import check_each, check_room
from quartet.http_gateway.ring.commands import Commands, UnansweredCommand
from quartet.http_gateway.ring.journal import JournalEntry, is_lost, names_adapter
from quartet.http_gateway.ring.levelling import Leveller
from quartet.http_gateway.ring.quarantine import POISON_REQUEST, Quarantine
from quartet.http_gateway.ring.request_group import RequestGroup
from quartet.http_gateway.ring.schedulers import Schedulers
from quartet.http_gateway.ring.transport import Meter, Receiver, Sender, send_frame
from quartet.http_gateway.ring.unloaded import UnloadedAdapters
from quartet.runtime.control import Abort, ControlCommand, Probe
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.guard import Announced, Guard, end_of
from quartet.runtime.messages import (
    ABORTED,
    GATEWAY,
    SCHEDULER,
    Facts,
    Finish,
    Generate,
    Message,
    Prepared,
    Reply,
    Restarted,
    Text,
    Tokens,
)

log = logging.getLogger(__name__)

# Receiving a frame that is there already does not give way to the endpoints; after so many they get their turn. When
# the gateway falls behind, about so many steps of a request become one chunk of its stream.
FRAMES_A_TURN = 8

INTRODUCE_AGAIN_S = 5.0
NOT_TAKEN = "Internal error: no service took the request."


class RingClient:
    """Owns everything that is on its way round the ring."""

    def __init__(
        self,
        inbox: Receiver,
        outbox: Sender,
        limit: int,
        meter: Meter,
        least_attempt: int = 0,
        announced: Announced | None = None,
        schedulers: int = 1,
        run_dir: str = "",
        watch: Callable[[int, Callable[[], None]], None] = death_watch.watch,
    ) -> None:
        """`least_attempt`: beyond all attempts of the gateway before. `watch`: tells of the end of a process."""
        self.closing = False  # no new requests: the server drains
        self.stale = 0  # messages for nobody: an old attempt, or a request that has ended
        self.last_heard_at = 0.0
        self.on_facts: Callable[[Facts], None] = lambda facts: None  # hears them, those of a restarted scheduler too
        self.guard = Guard(GATEWAY, announced or Announced(), self._give_up)
        self._inbox = inbox
        self._outbox = outbox
        self._limit = limit
        self._meter = meter
        self._pending: dict[str, JournalEntry] = {}
        self._least_attempt = self._attempt = least_attempt  # grows with every restart of a ring process
        self._serials = itertools.count(1)  # of requests, commands and relayed aborts
        self._quarantine = Quarantine()
        self._relayed = RelayedAborts()
        self.schedulers = Schedulers(schedulers, run_dir)
        self._watch = watch
        self._commands = Commands(partial(send_frame, outbox), self._serials, self.schedulers)
        self._leveller = Leveller(self.schedulers, self._commands.run, partial(names_adapter, self._pending))
        self._leveller.on_progress = self._send_named  # requests wait here for an adapter that their scheduler is given
        self._unloaded = UnloadedAdapters(self.schedulers, self._pending, outbox.send)
        self._idle = asyncio.Event()
        self._idle.set()
        self._receive: dict[type, Callable[[Any, float], None]] = {
            Text: self._on_text,
            Reply: self._on_answer,
            Probe: self._on_answer,
            Facts: self._on_facts,
            Prepared: lambda prepared, now: self._commands.on_prepared(prepared),
            Abort: self._on_abort,
            Restarted: self._on_restarted,
        }

    # requests

    def open(
        self, batch: list[Generate], parents: Sequence[str] | None = None, *, limited: bool = True
    ) -> RequestGroup:
        """Send requests in one frame. Raises RequestError: draining, too many in flight, a rid in use, too large.

        `parents` are the rids by which the client knows them, where those differ from their own. The limit of what
        may be in flight is for clients; the gateway's own requests are not `limited`.
        """
        if self.closing:
            raise RequestError("The server is shutting down.", Kind.UNAVAILABLE)
        check_each(batch, self._pending, self._quarantine)
        if limited:
            check_room(len(batch), len(self._pending), self._limit)
        group = RequestGroup([generate.request.rid for generate in batch], self._abort_group)
        now, entries = time.monotonic(), []
        for index, generate in enumerate(batch):
            parent = parents[index] if parents else ""
            rank = self.schedulers.choose(generate)
            entries.append(JournalEntry(generate, parent, group, index, next(self._serials), now, self._attempt, rank))
        if ready := [entry for entry in entries if self._may_be_sent(entry)]:
            send_frame(self._outbox, [self._message(entry) for entry in ready])
            for entry in ready:
                entry.in_ring = entry.known = True
        self._pending.update((entry.rid, entry) for entry in entries)
        self._idle.clear()
        return group

    def _message(self, entry: JournalEntry) -> Generate:
        return entry.message(self.schedulers.all[entry.rank].epoch)

    def _may_be_sent(self, entry: JournalEntry) -> bool:
        return self._quarantine.admits(entry) and not self._leveller.gives(entry.rank, entry.request.adapter)

    def _abort_group(self, group: RequestGroup) -> None:
        left = [entry for rid in group.rids if (entry := self._pending.get(rid)) and entry.group is group]
        for entry in left:
            entry.group = None
        self._abort_entries(left, ABORTED)

    def _abort_entries(self, entries: list[JournalEntry], message: str) -> None:
        """End requests: here what is not in the ring, else in the scheduler."""
        aborts = []
        for entry in entries:
            entry.requested_abort = entry.abort(message)
            if entry.in_ring:
                aborts.append(entry.requested_abort)
            else:
                self._end(entry, abort_finish(entry.requested_abort))
        self._send_aborts(aborts)

    def _send_aborts(self, aborts: list[Abort]) -> None:
        if aborts:
            self._outbox.send(aborts)

    def abort(self, command: Abort) -> int:
        """Abort one rid (with the requests made from it), all that begin with it, or all; how many were found."""
        found = [entry for entry in self._pending.values() if matches(command, entry)]
        self._abort_entries(found, command.abort_message)
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

    def _end(self, entry: JournalEntry, finish: Finish) -> None:
        """Finish one request here and now."""
        tokens = Tokens(rid=entry.request.rid, attempt=entry.attempt, finish=finish)
        self._on_text(Text(tokens=tokens), time.monotonic())

    # restarts

    async def introduce(self) -> None:
        """Say that this gateway is new, until every scheduler has said its facts."""
        while not self.schedulers.heard_of_all:
            self.ask_facts()
            await self.schedulers.hear_of_all(INTRODUCE_AGAIN_S)

    def ask_facts(self) -> None:
        """Have the schedulers say their facts; `on_facts` hears them."""
        ranks = range(len(self.schedulers.all))
        self._outbox.send([Restarted(role=GATEWAY, rank=rank, least_attempt=self._least_attempt) for rank in ranks])

    def _on_restarted(self, restarted: Restarted, now: float) -> None:
        self.ask_facts()  # those of a scheduler that was started again meanwhile may be lost; first hear of that death
        self._recover(restarted.role)

    def _recover(self, role: str, rank: int = 0, news: bool = True) -> None:
        """Send again what may have been lost with a service. `news`: that it has died; else what was sent since."""
        self._attempt += 1
        lost = [entry for entry in self._pending.values() if is_lost(entry, role, rank)]
        poison = self._quarantine.service_died(role, lost) if news else None
        for entry in lost:
            entry.withdraw(self._attempt)
            if role == SCHEDULER:
                entry.known = False
                self.schedulers.release(rank)
                entry.rank = self.schedulers.choose_again(entry.generate, rank)
        self._recover_aborts(role, rank, {entry.rid for entry in lost})
        if poison:
            self._end_poison_request(poison, role)
        again = self._send_ready(self._commands.recover(role, rank))
        name, count = self.schedulers.title(role, rank), len(self._pending)
        log.warning("The %s was started again; %d of %d requests are sent again.", name, again, count)

    def _on_death(self, rank: int, epoch: int) -> None:
        """A scheduler has ended: what it had goes on elsewhere at once, where another one lives."""
        if self.schedulers.note_death(rank, epoch):
            self._recover(SCHEDULER, rank)

    def _recover_aborts(self, role: str, rank: int, lost: set[str]) -> None:
        """Send the aborts again that may have been lost; a new scheduler has nothing to abort."""
        aborts = self._relayed.to_repeat(self._pending, lost)
        for entry in list(self._pending.values()):
            if entry.requested_abort is not None and (role != SCHEDULER or entry.rid in lost):  # its last message too
                aborts.append(entry.requested_abort)
                self._end(entry, abort_finish(entry.requested_abort))
        if role == SCHEDULER:
            self._relayed.forget(rank)
        else:
            self._send_aborts(aborts)

    def _end_poison_request(self, poison: JournalEntry, role: str) -> None:
        """End the request that ended a service, and all equal ones; block them for a while."""
        for entry in self._quarantine.block(poison, self._pending.values(), time.monotonic()):
            self._send_aborts([entry.abort()])
            self._end(entry, Finish.internal(POISON_REQUEST.format(role=role)))

    def _send_ready(self, commands: Sequence[UnansweredCommand] = ()) -> int:
        """Send the requests that are not in the ring and may be, and commands; how many requests that were."""
        for entry in self._quarantine.advance(self._pending.values()):
            self._attempt += 1
            entry.withdraw(self._attempt)
        held = [entry for entry in self._pending.values() if not (entry.in_ring or entry.requested_abort)]
        if self._quarantine.unproven and not self._quarantine.cleared:
            self._send_clearing_probe(held)
        ready: list[JournalEntry | UnansweredCommand] = [entry for entry in held if self._may_be_sent(entry)]
        sent = 0
        for item in sorted([*ready, *commands], key=lambda item: item.serial):
            if isinstance(item, UnansweredCommand):
                self._outbox.send(item.messages())
                continue
            try:
                send_frame(self._outbox, [self._message(item)])
            except RequestError as error:  # with its output it has become too large
                self._end(item, Finish.failed(error))
                continue
            item.in_ring = item.known = True
            sent += 1
        return sent

    def _send_named(self) -> None:
        """The same, where there are some that wait for an adapter and for nothing else."""
        held = (
            one for one in self._pending.values() if one.request.adapter and not (one.in_ring or one.requested_abort)
        )
        if self.schedulers.several and any(map(self._may_be_sent, held)):
            self._send_ready()

    def _send_clearing_probe(self, held: list[JournalEntry]) -> None:
        """Before suspects run: abort what is left in the ring of the others, and send a probe behind the aborts."""
        probes = self._quarantine.clearing_probes(f"clear.{next(self._serials)}", self.schedulers.targets)
        self._outbox.send([*(entry.abort() for entry in held if entry.known), *probes])

    # commands

    async def command(self, command: ControlCommand, timeout_s: float) -> Message:
        """Send a command through the ring and wait for its answer. Raises TimeoutError and RequestError."""
        return await self._commands.run(command, timeout_s)

    async def probe(self, timeout_s: float, rank: int | None = None) -> dict[str, dict[str, Any]]:
        """The counters of every hop, of this scheduler or of all, by title. Raises TimeoutError and RequestError."""
        answer = await self._commands.run(Probe(), timeout_s, rank)
        if not isinstance(answer, Probe):
            return {}
        return {**answer.counters, GATEWAY: {"failed_messages_total": self.guard.failed}}

    # what arrives

    async def listen(self) -> None:
        """Deliver everything that arrives, for ever."""
        for frame in itertools.count(1):
            messages = await self._inbox.recv()
            now = self.last_heard_at = time.monotonic()
            self.guard.each(messages, partial(self._handle, now))
            if frame % FRAMES_A_TURN == 0:
                await asyncio.sleep(0)

    def _handle(self, now: float, message: Message) -> list[Message]:
        self._receive.get(type(message), self._on_other)(message, now)
        return []

    def _give_up(self, message: Message, finish: Finish) -> list[Message]:
        """End the request or the command whose message could not be handled."""
        match end_of(message, finish):
            case Text(tokens=tokens) | (Tokens() as tokens):
                entry = self._pending.get(tokens.rid)
                if entry is not None and entry.attempt == tokens.attempt:
                    self._send_aborts([entry.abort()])
                    self._end(entry, finish)
            case Reply() as reply:
                self._on_answer(reply, time.monotonic())
        return []

    def _on_text(self, text: Text, now: float) -> None:
        entry = self._pending.get(text.tokens.rid)
        if entry is None or entry.attempt != text.tokens.attempt:
            self.stale += 1
            return
        ended = text.tokens.finish is not None
        if ended:
            del self._pending[text.tokens.rid]
            self.schedulers.release(entry.rank)
            self._unloaded.request_ended(entry.request.adapter)
            if not self._pending:
                self._idle.set()
        entry.delivered += text.tokens.ids
        if entry.last_heard_at:
            text.tokens.cached_tokens = entry.cached_tokens  # those of its first attempt
        if text.tokens.prompt_tokens:
            entry.prompt_tokens, entry.cached_tokens = text.tokens.prompt_tokens, text.tokens.cached_tokens
        if entry.group is not None:
            entry.group.put(entry.index, text)
        self._meter.count_delta(entry, text, now)
        entry.last_heard_at, entry.heard = now, True
        if self._quarantine.note_output(entry, ended):
            self._send_ready()

    def _on_answer(self, answer: Reply | Probe, now: float) -> None:
        if self._quarantine.takes(answer):
            if self._quarantine.cleared:
                self._send_ready()
            return
        unanswered = self._commands.deliver(answer, answer.id, answer.rank)
        if unanswered is None:
            self.stale += 1
        elif unanswered.succeeded and unanswered.command.ends_requests:
            self._end_before(unanswered.serial)

    def _end_before(self, serial: int) -> None:
        """A command has ended all requests before it: see to those whose last message was lost, or were held back."""
        left = [entry for entry in self._pending.values() if entry.serial < serial and not entry.requested_abort]
        self._abort_entries(left, ABORTED)

    def _on_facts(self, facts: Facts, now: float) -> None:
        one = self.schedulers.all[facts.rank]
        if facts.epoch < one.epoch + (one.heard and not one.up):  # the words of one that has ended may come late
            return
        common = self.schedulers.common(facts)
        self.on_facts(common)  # first: where it raises, nothing has been believed
        new = not one.heard or facts.epoch > one.epoch
        given_away, one.given_away = one.given_away, False
        if new:
            self._leveller.forget_failure(facts.rank)
        restarted = self.schedulers.note_facts(facts, common)
        if (now_common := self.schedulers.common(facts)) != common:  # with it, others may serve
            self.on_facts(now_common)
        if restarted:  # what was given away is elsewhere, but for what found no other
            self._recover(SCHEDULER, facts.rank, news=not given_away)
        if new and facts.pid and self.schedulers.several:
            self._watch(facts.pid, partial(self._on_death, facts.rank, facts.epoch))
        self._unloaded.look()
        self._leveller.look_at(facts.rank)

    def _on_abort(self, abort: Abort, now: float) -> None:
        """The detokenizer has met a stop string: the scheduler, further on in the ring, is to end the request."""
        self._relayed.note(next(self._serials), abort)
        self._send_aborts([abort])

    def _on_other(self, message: Message, now: float) -> None:
        """Something went all the way round and no hop took it: a command is refused, the rest is a fault."""
        if isinstance(message, ControlCommand):
            name = type(message).__struct_config__.tag
            self._on_answer(Reply(id=message.id, success=False, status=400, message=f"{name} is not supported."), now)
            return
        log.error("a %s message came back to the gateway; no service took it", type(message).__name__)
        self._give_up(message, Finish.internal(NOT_TAKEN))
