"""The processes of the ring: the real services, with links for sockets and a plan for their deaths.

Whatever a process does to the world outside it (it reads, sends, writes a record, launches a step) is a point at which
it may die: what it did before has happened, what it would have done after has not.
"""

import zlib
from array import array
from collections.abc import Callable, Generator
from collections.abc import Sequence as Frame
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.service import Detokenizer
from quartet.runtime.control import UpdateWeightsFromDisk, UpdateWeightVersion
from quartet.runtime.errors import CommandRefused
from quartet.runtime.guard import Announced, Guard, Service
from quartet.runtime.messages import Generate, Message, Reply, Restarted, Tokens, process_key, unpack_ids
from quartet.runtime.service import Sender
from quartet.runtime.sockets import decode, encode
from quartet.scheduler_service.control import weights as control_weights
from quartet.scheduler_service.control.agreement import agreed
from quartet.scheduler_service.control.context import Context
from quartet.scheduler_service.control.durable_state import DurableState
from quartet.scheduler_service.control.handlers import HANDLERS
from quartet.scheduler_service.control.runner import CommandRunner
from quartet.scheduler_service.core.plan import Plan, Result
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.scheduler_service.scheduler import Scheduler
from quartet.tokenizer_service.encode import Encoder
from quartet.tokenizer_service.way_out import Crossroads
from tests.fakes import AtOnce, FakeGrammars, FakeWorker, looping_token
from tests.simulated_ring.clock import Agenda
from tests.simulated_ring.links import Inbox, Link

TOKENIZER, SCHEDULER, DETOKENIZER, GATEWAY = "tokenizer", "scheduler", "detokenizer", "gateway"
ROLES = (TOKENIZER, SCHEDULER, DETOKENIZER, GATEWAY)
POISON = {TOKENIZER: 397, SCHEDULER: 398, DETOKENIZER: 399}  # the last id of a prompt that ends this role
MOST_STAGING_TURNS = 6
FIRST_VERSION = "v0"
ID_BYTES = 4

Note = Callable[[str, str, Frame[Message]], None]  # (sender, verb, messages) for the trace


class Killed(BaseException):
    """The process ends here."""


class Process:
    """One incarnation of a service, from its first bind to its death."""

    def __init__(
        self,
        role: str,
        epoch: int,
        inbox: Inbox,
        outboxes: dict[str, Link],
        note: Note,
        newest: Callable[[str], int],
        rank: int = 0,
        schedulers: int = 1,
    ) -> None:
        """`newest`: the epoch of a process's last incarnation, by key. `outboxes`: by the key of who receives."""
        self.role, self.epoch, self.rank, self.schedulers = role, epoch, rank, schedulers
        self.key = process_key(role, rank)
        self.announced = Announced(newest, schedulers)
        self.spoken = False  # its first word has left
        self.points_left: int | None = None  # until its death
        self.hung = False  # it does nothing any more, until the supervisor ends it
        self._inbox, self._outboxes = inbox, outboxes
        self._way_out: Sender = LinkSender(next(iter(outboxes.values())))
        self._note = note

    def turn(self) -> bool:
        """Do one thing, if there is any. Raises Killed."""
        if any(link.blocks for link in self._outboxes.values()):
            return False
        if not self.spoken:
            self.spoken = True
            self.introduce()
            return True
        return self.work()

    def introduce(self) -> None:
        raise NotImplementedError

    def work(self) -> bool:
        raise NotImplementedError

    @property
    def at_rest(self) -> bool:
        return self.spoken and not self._inbox.waiting

    def point(self) -> None:
        if self.points_left is not None:
            self.points_left -= 1
            if self.points_left <= 0:
                raise Killed(self.role)

    # the sockets, as Inbox and Outbox have them

    def recv(self, timeout_s: float | None = 0.0) -> list[Any]:
        messages: list[Any] = []
        while frame := self._inbox.take():
            messages += decode(frame)
        if messages:
            self._note(self.key, "takes", messages)
            self.point()
        return messages

    def send(self, messages: Frame[Message]) -> None:
        if messages:
            self.point()
            self._note(self.key, "sends", messages)
            self._way_out.send(messages)
            self.point()


class LinkSender:
    """As Outbox has it."""

    def __init__(self, link: Link, point: Callable[[], None] = lambda: None) -> None:
        """`point`: the sender may die behind each frame."""
        self._link, self._point = link, point

    def send(self, messages: Frame[Message]) -> None:
        if messages:
            self._link.send(encode(messages))
            self._point()


class TextService(Process):
    """As `quartet.runtime.service.run_text_service` has it."""

    def __init__(self, service: Service, **place: Any) -> None:
        super().__init__(**place)
        self.service = service
        self.guard = Guard(self.role, self.announced, service.give_up)

    def introduce(self) -> None:
        if self.epoch:
            self.send([Restarted(role=self.role)])

    def work(self) -> bool:
        batch = self.recv()
        if any(self.is_deadly(message) for message in batch):
            raise Killed(self.role)
        if not batch and self.service.patience_s is None:
            return False
        self.send(self.guard.batch(self.service, batch))
        return True

    @property
    def at_rest(self) -> bool:
        return super().at_rest and self.service.patience_s is None

    def is_deadly(self, message: Message) -> bool:
        raise NotImplementedError


class TokenizerProcess(TextService):
    def __init__(self, encoder: Encoder, **place: Any) -> None:
        super().__init__(role=TOKENIZER, service=encoder, **place)
        if self.schedulers > 1:
            senders = {key: LinkSender(link, self.point) for key, link in self._outboxes.items()}
            past = senders.pop(DETOKENIZER)
            self._way_out = Crossroads(list(senders.values()), past)

    def is_deadly(self, message: Message) -> bool:
        return isinstance(message, Generate) and is_poison(message.input_ids, TOKENIZER)


class DetokenizerProcess(TextService):
    def __init__(self, vocabulary: Vocabulary, **place: Any) -> None:
        self.detokenizer = Detokenizer(vocabulary, AtOnce())
        super().__init__(role=DETOKENIZER, service=self.detokenizer, **place)

    def is_deadly(self, message: Message) -> bool:
        return isinstance(message, Tokens) and is_poison(message.prompt_tail, DETOKENIZER)


def is_poison(prompt: bytes, role: str) -> bool:
    return len(prompt) >= ID_BYTES and len(prompt) % ID_BYTES == 0 and unpack_ids(prompt)[-1] == POISON[role]


class Worker(FakeWorker):
    """The fake model, whose tokens depend on the weights that serve. Some prompts are too much for it."""

    def __init__(self, point: Callable[[], None], version: str, **settings: Any) -> None:
        super().__init__(model=self._token, **settings)
        self.weight_version = version
        self._point = point

    def launch(self, plan: Plan) -> list[Result]:
        for part in plan.slices:
            if part.sequence.ids[part.sequence.prompt_len - 1] == POISON[SCHEDULER]:
                raise Killed(SCHEDULER)
        self._point()
        self.plans.clear()
        self.forgotten.clear()
        return super().launch(plan)

    def _token(self, prefix: "array[int]", vocab_size: int, seed: int) -> int:
        return drawn(prefix, seed, self.weight_version, vocab_size)


def drawn(prefix: "array[int]", seed: int, weight_version: str, vocab_size: int) -> int:
    """The token behind a prefix, under these weights."""
    return looping_token(prefix, vocab_size, zlib.crc32(weight_version.encode(), seed))


class State(DurableState):
    """State whose scheduler may die before or after it has saved it."""

    def __init__(self, run_dir: str, point: Callable[[], None]) -> None:
        super().__init__(run_dir)
        self._point = point

    def save(self, context: Context) -> None:
        self._point()
        super().save(context)
        self._point()


class Disk:
    """What outlasts a scheduler besides its durable state: which weights were committed last."""

    def __init__(self, run_dir: str) -> None:
        Path(run_dir).mkdir()
        self.run_dir = run_dir
        self.weight_version = FIRST_VERSION


class Progress:
    def beat(self, busy: bool) -> None:
        """Nobody looks."""


class SchedulerProcess(Process):
    """As `scheduler_service.assemble.serve` has it; weights are swapped by a handler without files and threads."""

    def __init__(
        self,
        config: PlannerConfig,
        depth: int,
        disk: Disk,
        agenda: Agenda,
        random: Random,
        carried_out: list[tuple[str, int, str]],
        pid: int,
        **place: Any,
    ) -> None:
        super().__init__(role=SCHEDULER, **place)
        self.disk, self.random, self.carried_out, self.pid = disk, random, carried_out, pid
        self.worker = Worker(
            self.point,
            disk.weight_version,
            page_size=config.page_size,
            page_count=config.total_pages,
            max_running_requests=config.max_running,
            vocab_size=config.vocab_size,
        )
        durable_state = State(disk.run_dir, self.point)
        facts = msgspec.structs.replace(self.worker.facts(), epoch=self.epoch, rank=self.rank, pid=pid)
        self.scheduler = Scheduler(
            Planner(config),
            self.worker,
            self,
            self,
            Progress(),  # type: ignore[arg-type]
            facts=facts,
            depth=depth,
            durable_state=durable_state,
            grammars=FakeGrammars(),  # type: ignore[arg-type]
            announced=self.announced,
            clock=lambda: agenda.now,
        )
        self.scheduler.commands = CommandRunner(
            {**HANDLERS, UpdateWeightsFromDisk: self.update_weights, UpdateWeightVersion: self.rename}
        )
        durable_state.restore(self.scheduler)

    @property
    def at_rest(self) -> bool:
        scheduler = self.scheduler
        return super().at_rest and scheduler.idle and not scheduler.commands and not scheduler.grammar_queue

    def introduce(self) -> None:
        self.scheduler.emit(self.scheduler.introduce())

    def work(self) -> bool:
        if self.at_rest:
            return False
        self.scheduler.step()
        return True

    def update_weights(
        self, scheduler: Scheduler, command: UpdateWeightsFromDisk
    ) -> Generator[None, bool | None, list[Message]]:
        """What `control_weights.from_disk` does, without weights: staged beside the loop, swapped, then recorded."""
        yield from self._beside()
        control_weights.refuse_unless_expected(scheduler, command)
        if command.model_path == "broken":
            raise CommandRefused("nothing was changed")
        yield from agreed(scheduler, command)
        if command.abort_all_requests:
            scheduler.emit(control_weights.abort_all(scheduler))
        if command.retract:
            scheduler.planner.retract_all()
            scheduler.forget_released()
        self.carried_out.append((self.key, self.epoch, command.id))
        self.worker.weight_version = command.weight_version or self.worker.weight_version
        scheduler.planner.forget_prefixes(free=command.flush_cache)
        yield from self._beside()
        self.point()
        self.disk.weight_version = self.worker.weight_version
        self.point()
        reply: list[Message] = [Reply(id=command.id, body={"weight_version": self.worker.weight_version})]
        return reply

    def rename(self, scheduler: Scheduler, command: UpdateWeightVersion) -> list[Message]:
        """How a scheduler that has come back gets the weights of the others: here the version is the weights."""
        self.worker.weight_version = command.new_version
        scheduler.planner.forget_prefixes()
        self.point()
        self.disk.weight_version = command.new_version
        self.point()
        return [Reply(id=command.id, body={"weight_version": command.new_version})]

    def _beside(self) -> Generator[None, bool | None, None]:
        for _ in range(self.random.randint(1, MOST_STAGING_TURNS)):
            yield
