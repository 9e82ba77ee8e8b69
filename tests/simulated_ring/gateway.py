"""The gateway's end of the ring in an event loop of its own, and who hears what reaches it."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from quartet.http_gateway.main import ATTEMPTS_OF_A_GATEWAY
from quartet.http_gateway.ring.first_lap import wait_until_connected
from quartet.http_gateway.ring.journal import JournalEntry
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.control import (
    REWRITTEN,
    ContinueGeneration,
    ControlCommand,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    UpdateWeightsFromDisk,
)
from quartet.runtime.messages import Message, Reply, Text
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.sockets import decode, encode
from tests.configs import resolved
from tests.simulated_ring.clock import Agenda, TurnLoop
from tests.simulated_ring.directories import Directories
from tests.simulated_ring.faults import hold
from tests.simulated_ring.load import VOCAB_SIZE, Call, Operator
from tests.simulated_ring.services import FIRST_VERSION, GATEWAY, Killed, Process
from tests.simulated_ring.trace import serial

MOST_INFLIGHT = 60
SERIALS_OF_A_GATEWAY = 1_000_000
CONFIG = msgspec.structs.replace(resolved(model_path="model"), tool_call_parser=None, reasoning_parser=None)
MODEL = ModelInfo(
    path="/models/x",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    vocab_size=VOCAB_SIZE,
    hidden_size=4,
    context_length=512,
    eos_ids=[],
    config={},
)


class Watch:
    """Sees every text and reply that reaches the gateway, in order, and knows what the operator was promised."""

    def __init__(self, operator: Operator, directories: Directories) -> None:
        self.paused = False  # for sure: a pause was answered, and nothing was sent since that ends it
        self.asleep = False  # likewise: memory was released
        self.weight_version: str | None = FIRST_VERSION  # for sure: an update was answered, and none was sent since
        self.ended_before = 0  # serial of a pause that has ended all requests before it
        self._operator, self._directories = operator, directories

    def count_delta(self, entry: JournalEntry, text: Text, now: float) -> None:
        """As quartet.http_gateway.http.metrics.Metrics."""
        tokens = text.tokens
        hold(not (tokens.ids and self.paused), tokens.rid, "goes on in a pause")
        hold(not (tokens.ids and self.asleep), tokens.rid, "goes on without memory")
        hold(not (tokens.ids and entry.serial < self.ended_before), tokens.rid, "goes on though a pause has ended it")
        if tokens.ids and self.weight_version is not None:
            right = {self.weight_version}
            if self._directories.are_rewritten:  # those of all schedulers, perhaps
                right.add(REWRITTEN.format(self.weight_version))
            made = tokens.weight_version
            hold(made in right, tokens.rid, "has a token of", made, "while", self.weight_version, "serves")

    def sends(self, command: ControlCommand) -> None:
        match command:
            case ContinueGeneration():
                self.paused = False
            case ResumeMemory():
                self.asleep = False
            case UpdateWeightsFromDisk():
                self.weight_version = None

    def on_reply(self, reply: Reply) -> None:
        order = next((o for o in self._operator.orders if o.command.id == reply.id and o.under_way), None)
        match order and order.command:
            case PauseGeneration() as pause if reply.success:
                self.paused = True
                self.ended_before = int(serial(reply.id)) if pause.ends_requests else self.ended_before
            case ReleaseMemory() if reply.success:
                self.asleep = True
            case UpdateWeightsFromDisk(weight_version=version) as update if reply.success:
                self.weight_version = version
                self.paused = self.paused or update.keep_pause


class GatewayProcess(Process):
    """As `quartet.http_gateway.main.serve` has it, without HTTP: clients are tasks of its loop."""

    def __init__(
        self,
        agenda: Agenda,
        watch: Watch,
        is_dead: Callable[[int], bool],
        run_dir: str,
        has_adapters: bool,
        **place: Any,
    ) -> None:
        super().__init__(role=GATEWAY, **place)
        self.loop = TurnLoop(agenda)
        self.up = False  # clients are let in
        self.dead = False
        self.calls: list[Call] = []
        self._watch = watch
        self._arrived: asyncio.Future[None] | None = None
        self.watched: dict[int, Callable[[], None]] = {}  # by process number
        self._is_dead, self._run_dir = is_dead, run_dir
        self._config = msgspec.structs.replace(CONFIG, enable_lora=has_adapters)
        self._inbox.tell(self._on_arrival)
        self.loop.create_task(self._serve())

    async def _serve(self) -> None:
        least_attempt = self.epoch * ATTEMPTS_OF_A_GATEWAY
        self.ring = ring = RingClient(
            self,
            Sender(self),
            MOST_INFLIGHT,
            self._watch,
            least_attempt,
            self.announced,
            schedulers=self.schedulers,
            run_dir=self._run_dir,
            watch=self._watch_process,
        )
        self._deliver, ring._receive[Reply] = ring._receive[Reply], self._on_reply
        serials = itertools.count(1 + self.epoch * SERIALS_OF_A_GATEWAY)  # in place of a process number of its own
        ring._serials = ring._commands._serials = serials
        self.loop.create_task(ring.listen())
        if self.epoch:
            await ring.introduce()
        facts = await ring.schedulers.facts()
        self.gateway = Gateway(self._config, MODEL, facts, ring, None, None)  # type: ignore[arg-type]
        ring.ask_facts()
        await wait_until_connected(ring.probe)
        self.up = True

    def _watch_process(self, pid: int, on_end: Callable[[], None]) -> None:
        if self._is_dead(pid):
            self.loop.call_soon(on_end)
        else:
            self.watched[pid] = on_end

    def hear_of_death(self, pid: int) -> None:
        """A process that is watched has ended."""
        if (on_end := self.watched.pop(pid, None)) is not None:
            self.loop.call_soon(on_end)

    def _on_reply(self, reply: Reply, now: float) -> None:
        self._tell_watch(reply)
        self._deliver(reply, now)

    def _tell_watch(self, reply: Reply) -> None:
        waiting = self.ring._commands._unanswered.get(reply.id)
        if self.schedulers > 1 and (waiting is None or waiting.waiting != [reply.rank] or waiting.cause):
            return  # another one has not answered yet, or has refused; or a gateway before has asked, who knows whom
        if waiting is None or not waiting.answer.done():  # else the operator was told that the command is lost
            self._watch.on_reply(reply)

    @property
    def at_rest(self) -> bool:
        return not (self.loop.ready or self._inbox.waiting)

    def turn(self) -> bool:
        """One turn of its loop. Raises what a task has raised."""
        turned = self.loop.turn()
        if self.dead:
            raise Killed(GATEWAY)
        for task in self.loop.ended:
            if (error := task.exception()) is not None:
                raise error
        self.loop.ended.clear()
        return turned

    def point(self) -> None:
        try:
            super().point()
        except Killed:
            self.dead = True  # and raised in `turn`: a task would swallow it

    async def recv(self) -> list[Any]:  # type: ignore[override]
        """The messages of the next frame, as AsyncInbox has it."""
        while not (frame := self._inbox.take()):
            self._arrived = self.loop.create_future()
            await self._arrived
        messages = decode(frame)
        self._note(self.role, "takes", messages)
        self.point()
        return messages

    def _on_arrival(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def post(self, messages: Sequence[Message]) -> None:
        """As AsyncOutbox: never waits. A task of a dead gateway that is still dropped somewhere sends nothing."""
        frame = encode(messages)
        if not self.dead:
            self.point()
        if not self.dead:
            self._note(self.role, "sends", messages)
            next(iter(self._outboxes.values())).send(frame)


class Sender:
    """The gateway's way out; its own `send` is that of a service, which blocks."""

    def __init__(self, process: GatewayProcess) -> None:
        self._process = process

    def send(self, messages: Sequence[Message]) -> None:
        self._process.post(messages)
