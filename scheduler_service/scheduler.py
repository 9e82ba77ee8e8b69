"""The scheduler's loop: receive messages, plan a step, launch it, send the results of earlier steps.

`depth` is how many launched steps may be uncollected while the next one is planned: with 0 a step is collected before
the next is planned, with 1 planning overlaps the computation of the last step.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from quartet.runtime import sampling
from quartet.runtime.control import ControlCommand
from quartet.runtime.errors import RequestError
from quartet.runtime.guard import Announced, Guard, end_of
from quartet.runtime.messages import (
    ABORTED_IN_QUEUE,
    SCHEDULER,
    Facts,
    Finish,
    Message,
    Request,
    Restarted,
    Tokenized,
)
from quartet.runtime.process.progress import IDLE_BEAT_S, ProgressWord
from quartet.scheduler_service.answers import behind_facts, check_hidden_states, signed, stamp, tokens_of, unqueued_end
from quartet.scheduler_service.control.adapter_queue import AdapterQueue
from quartet.scheduler_service.control.context import Decisions
from quartet.scheduler_service.control.durable_state import DurableState
from quartet.scheduler_service.control.handlers import HANDLERS
from quartet.scheduler_service.control.runner import CommandRunner
from quartet.scheduler_service.core import request
from quartet.scheduler_service.core.plan import Plan, Result, Update
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.grammar.grammar_queue import GrammarQueue, Pool, is_complete
from quartet.scheduler_service.grammar.matchers import Grammar
from quartet.scheduler_service.report import Report
from quartet.scheduler_service.ring_ends import Receiver, Sender
from quartet.scheduler_service.step_queue import StepQueue, StepWorker

if TYPE_CHECKING:
    from quartet.scheduler_service.control.idle import Sleeper
    from quartet.scheduler_service.execution.adapters import AdapterStore
    from quartet.scheduler_service.execution.experts import ExpertRecorder
    from quartet.scheduler_service.execution.kv_tier import KvTierStore
    from quartet.scheduler_service.execution.memory_saver import MemorySaver
    from quartet.scheduler_service.execution.profile import Profile
    from quartet.scheduler_service.weights.update import Updates

log = logging.getLogger(__name__)

COMMAND_POLL_S = 0.002  # how often an idle scheduler resumes unfinished commands
GRAMMAR_POLL_S = 0.001  # how often an idle scheduler looks for compiled grammars, and for KV from files


class Worker(StepWorker, Protocol):
    """The model and its memory, as the scheduler uses them."""

    weight_version: str
    expert_recorder: "ExpertRecorder | None"  # None: the server does not record

    def forget(self, sequence: request.Sequence) -> None:
        """Drop the state of a sequence that has left the batch."""
        ...


class Scheduler:
    """One rank's loop over its planner and its worker."""

    def __init__(
        self,
        planner: Planner,
        worker: Worker,
        inbox: Receiver,
        outbox: Sender,
        progress: ProgressWord,
        *,
        facts: Facts | None = None,
        depth: int = 0,
        decode_log_interval: int = 40,
        hidden_size: int = 0,
        grammars: Pool | None = None,
        updates: "Updates | None" = None,
        saver: "MemorySaver | None" = None,
        durable_state: DurableState | None = None,
        adapters: "AdapterStore | None" = None,
        sleeper: "Sleeper | None" = None,
        tier: "KvTierStore | None" = None,
        idle_work: Callable[[], bool] | None = None,
        cuda_graph: bool = False,
        announced: Announced | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.planner = planner
        self.worker = worker
        self.inbox = inbox
        self.outbox = outbox
        self.progress = progress
        self.facts = facts
        self.depth = depth
        self.hidden_size = hidden_size
        self.clock = clock
        self.updates = updates  # None: the weights stay as they are
        self.saver = saver  # None: memory is never released
        self.adapters = adapters  # None: requests cannot name any
        if adapters is not None:
            planner.waiting.set_adapter_versions(adapters.version_of)
        self.durable_state = durable_state  # None: nothing outlasts this scheduler
        self.sleeper = sleeper  # None: memory is kept while nothing is asked
        self.tier = tier  # None: KV is kept in the pool only
        self.idle_work = idle_work  # does a piece of work while nothing is to compute; returns whether more is left
        self.has_idle_work = idle_work is not None  # as far as is known
        self.step_sleep_s = 0.0  # a test aid
        self.decisions = Decisions()
        self.guard = Guard(SCHEDULER, announced or Announced(), self.give_up)
        self.profile: Profile | None = None  # a recording under way
        self.commands = CommandRunner(HANDLERS)
        self.grammar_queue = GrammarQueue(grammars)
        self.adapter_queue = AdapterQueue(adapters, planner, self.adapters_changed, lambda: self.grammar_queue.requests)
        self.report = Report(planner, decode_log_interval, clock(), cuda_graph)
        self.launched = StepQueue(worker)
        self.least_attempt = 0  # of the current gateway

    @property
    def now(self) -> float:
        return self.clock()

    @property
    def epoch(self) -> int:
        """Which incarnation of the scheduler this is."""
        return self.facts.epoch if self.facts else 0

    @property
    def idle(self) -> bool:
        """Nothing to compute and no step uncollected: only a message can change that."""
        return not (self.planner.busy or self.launched)

    def run(self) -> None:
        while True:
            self.step()

    def step(self) -> None:
        """One iteration of the loop; blocks on the inbox when there is nothing to do."""
        self.receive()
        if plan := self.decide():
            plan.weight_version = self.worker.weight_version
            plan.adapter_versions = self.adapter_versions
            if self.step_sleep_s:
                time.sleep(self.step_sleep_s)
            self.apply(self.launched.launch(plan))
            if self.profile is not None and self.profile.stepped():
                self.profile = None
            self.has_idle_work = self.idle_work is not None
        elif self.idle and self.idle_work is not None and self.has_idle_work and not self.planner.asleep:
            self.has_idle_work = self.idle_work()
        while len(self.launched) > (self.depth if plan else 0):
            self.apply(self.launched.collect_oldest())

    def receive(self) -> None:
        """Handle all messages in the inbox, requests whose grammar is compiled, time limits and unfinished commands."""
        arrived = self.inbox.recv(self.patience_s)
        self.planner.advance_clock(self.now)  # time spent in recv does not count against the requests just received
        out = self.guard.each(arrived, self.handle)
        for message, grammar in self.grammar_queue.take_compiled():
            out += self.guard.each([message], partial(self.admit_compiled, grammar))
        for message, outcome in self.adapter_queue.take_ready():
            out += self.guard.each([message], partial(self.admit_adapted, outcome))
        out += self.messages(self.planner.expire(self.now))
        if self.sleeper is not None:
            out += self.guard.each(self.sleeper.turn(self), self.handle)
        if self.commands:
            out += self.commands.advance(self.planner.prefills_next)
        if self.durable_state:
            self.durable_state.save(self)
        self.emit(behind_facts(self.told, out))

    def handle(self, message: Message) -> list[Message]:
        """Queue a request, start a command, send any other message on. Returns the messages to send."""
        match message:
            case Tokenized():
                return self.admit(message)
            case Restarted(role="gateway", least_attempt=least):
                return self.introduce(least)
            case ControlCommand() if type(message) in self.commands.handlers:
                if self.sleeper is not None and self.sleeper.holds(message):
                    return []
                return self.commands.start(self, message)
            case _:
                return [message]

    def introduce(self, least_attempt: int = 0) -> list[Message]:
        """Send the gateway the facts of the model, and end requests of an earlier gateway: their attempt is smaller.

        Such requests that have not arrived yet are dropped in `admit`.
        """
        self.least_attempt = max(self.least_attempt, least_attempt)
        old = [request.rid for request in self.requests if request.attempt < self.least_attempt]
        ended = [message for rid in old for message in self.abort(rid)]
        self.forget_released()
        return [*ended, *self.told]

    @property
    def told(self) -> list[Message]:
        """What `emit` sends as the facts of the model with the state that there is then."""
        return [] if self.facts is None else [self.facts]

    def tell_state(self) -> None:
        """Tell the gateway the state, though it has not asked."""
        self.emit(self.told)

    def state(self) -> dict[str, Any]:
        """The state that the gateway has to know, for itself and for clients."""
        served = {} if self.updates is None else self.updates.committed.told
        return {
            **served,
            "weight_version": self.worker.weight_version,
            "paused": self.planner.paused,
            **({} if self.sleeper is None else {"sleeping": self.sleeping}),
            **self.memory_state(),
            **self.adapter_queue.state(),
        }

    @property
    def sleeping(self) -> bool:
        """Whether memory is given back until somebody asks for something."""
        return self.sleeper is not None and self.sleeper.sleeping

    def memory_state(self) -> dict[str, Any]:
        """Whether no step runs for lack of memory or weights that a client has released; `lacks` are the tags."""
        return {"asleep": self.planner.asleep and not self.sleeping, "lacks": self.saver.lacks if self.saver else []}

    @property
    def patience_s(self) -> float:
        """How long `receive` may wait for a message."""
        if self.tier is not None and self.tier.holds_up and not self.launched:
            return GRAMMAR_POLL_S
        if not self.idle or self.has_idle_work:
            return 0.0
        if self.grammar_queue:
            return GRAMMAR_POLL_S
        if self.adapter_queue or (self.sleeper is not None and self.sleeper.waking):
            return COMMAND_POLL_S
        return COMMAND_POLL_S if self.commands else IDLE_BEAT_S

    def admit(self, message: Tokenized) -> list[Message]:
        """Queue a request; if it has a grammar, once that is compiled."""
        if message.request.attempt < self.least_attempt:
            log.info("dropped request %s of a gateway that has ended", message.request.rid)
            return []
        if message.request.epoch < self.epoch:
            log.info("dropped request %s, sent to the scheduler before: it comes again", message.request.rid)
            return []
        try:
            self.adapter_queue.check(message.request)
            if message.request.params.grammar is None:
                return self.queue(message)
            self.grammar_queue.put(message)
        except RequestError as error:
            return [unqueued_end(message, Finish.failed(error))]
        return []

    def admit_compiled(self, grammar: Grammar | RequestError, message: Tokenized) -> list[Message]:
        """Queue a request whose grammar is compiled, or end it if the grammar was refused."""
        try:
            if isinstance(grammar, RequestError):
                raise grammar
            if is_complete(message, grammar):
                return [unqueued_end(message, Finish(reason="stop"))]
            return self.queue(message, grammar)
        except RequestError as error:
            return [unqueued_end(message, Finish.failed(error))]

    def give_up(self, message: Any, finish: Finish) -> list[Message]:
        """End the request of a message whose handling failed."""
        ending = end_of(message, finish)
        if isinstance(message, Tokenized):
            rid, attempt = message.request.rid, message.request.attempt
            if any(request.attempt == attempt for request in self.requests if request.rid == rid):
                _ = self.grammar_queue.remove(rid), self.adapter_queue.remove(rid)
                if updates := self.messages(self.planner.end(rid, finish)):
                    return updates
        return [ending] if ending else []

    def queue(self, message: Tokenized, grammar: Grammar | None = None) -> list[Message]:
        sampling.check_params(message.request.params, self.planner.config.vocab_size)  # so has the gateway
        check_hidden_states(message, self.hidden_size)
        if self.adapter_queue.takes(message, grammar):
            return []
        return self.messages(self.planner.add(message, self.now, grammar))

    def admit_adapted(self, grammar: Grammar | RequestError | None, message: Tokenized) -> list[Message]:
        """Queue a request whose adapter is in memory now, or end it if that cannot be."""
        try:
            if isinstance(grammar, RequestError):
                raise grammar
            return self.messages(self.planner.add(message, self.now, grammar))
        except RequestError as error:
            return [unqueued_end(message, Finish.failed(error))]

    def adapters_changed(self) -> None:
        """Have no request match KV of a version that is gone, and tell the gateway."""
        self.planner.waiting.set_adapter_versions(self.adapter_versions)
        self.tell_state()

    @property
    def adapter_versions(self) -> Mapping[str, str]:
        """Version of each adapter, by name."""
        return {} if self.adapters is None else self.adapters.version_of

    @property
    def requests(self) -> list[Request]:
        """All requests that have not ended."""
        queued = [*self.grammar_queue.requests, *self.adapter_queue.requests]
        return [*queued, *(sequence.request for sequence in self.planner.live.values())]

    def abort(self, rid: str, reason: str = "") -> list[Message]:
        """End one request and return its last messages; none if the rid is unknown."""
        updates = self.messages(self.planner.abort(rid, reason))
        if message := self.grammar_queue.remove(rid) or self.adapter_queue.remove(rid):
            updates.append(unqueued_end(message, Finish(reason="abort", message=reason or ABORTED_IN_QUEUE)))
        return updates

    def decide(self) -> Plan | None:
        """Plan the next step; the worker drops the state of requests that left the batch."""
        plan = self.planner.next(self.now) if self.tier is None else self.tier.plan(self.now)
        self.report.record_plan(plan)
        self.forget_released()
        self.progress.beat(busy=not self.idle)
        return plan

    def apply(self, collected: Iterable[tuple[Plan, list[Result]]]) -> None:
        """Apply the results of steps in order, and send the output of each."""
        for plan, results in collected:
            self.emit(self.commit(plan, results))

    def commit(self, plan: Plan, results: list[Result]) -> list[Message]:
        """Apply the results of one step; returns the messages to send."""
        updates = self.planner.apply(plan, results, self.now)
        self.forget_released()
        self.report.record_results(plan, self.now)
        if self.planner.idle:
            self.audit()
        return self.messages(updates, plan.weight_version, plan.adapter_versions)

    def has_unfinished(self, kind: type[ControlCommand]) -> bool:
        """Whether an earlier command of this kind is not finished."""
        return self.commands.has_unfinished(kind)

    def emit(self, messages: list[Message]) -> None:
        """Send messages in one frame; facts as they are now, behind others that were told meanwhile."""
        if messages:
            now = [msgspec.structs.replace(one, state=self.state()) if one is self.facts else one for one in messages]
            self.outbox.send(signed(now, self.facts.rank if self.facts else 0))

    def messages(
        self, updates: Iterable[Update], weight_version: str = "", adapter_versions: Mapping[str, str] | None = None
    ) -> list[Message]:
        """The messages for updates."""
        version = weight_version or self.worker.weight_version
        adapters = self.adapter_versions if adapter_versions is None else adapter_versions
        found: list[Message] = []
        for update in updates:
            adapter_version = adapters.get(update.sequence.request.adapter, "")
            tokens = tokens_of(update, version, self.hidden_size, adapter_version)
            if update.sequence.times is not None:
                stamp(tokens, update, self.now)
            found.append(tokens)
        return found

    def counters(self) -> dict[str, Any]:
        """The counters of this service for a Probe, by name."""
        return {
            **self.report.counters(),
            "num_grammar_queue_reqs": len(self.grammar_queue),
            "num_adapter_queue_reqs": len(self.adapter_queue),
            "sleeping": int(self.sleeping),
            "weight_version": self.worker.weight_version,
            "failed_messages_total": self.guard.failed,
        }

    def forget_released(self) -> None:
        if released := self.planner.released:
            for sequence in released:
                self.worker.forget(sequence)
            released.clear()

    def pause_without_memory(self) -> None:
        """Run no step while memory is released, or while released weights have not been written again."""
        lacks = self.saver is not None and bool(self.saver.lacks)
        self.planner.asleep = self.sleeping or lacks or (self.updates is not None and bool(self.updates.lost))

    def audit(self) -> None:
        """Check the page accounting, with no live request. On a fault, log it and start with an empty cache."""
        if fault := self.planner.audit():
            log.error("KV pool page counts do not balance while idle (%s); starting with an empty cache", fault)
            self.planner.repair()
