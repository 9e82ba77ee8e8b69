"""The processes of the ring: the real services, with links for sockets and a plan for their deaths.

Whatever a process does to the world outside it (it reads, sends, writes a record, launches a step) is a point at which
it may die: what it did before has happened, what it would have done after has not.
"""

from collections.abc import Callable
from collections.abc import Sequence as Frame
from typing import Any

from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.service import Detokenizer
from quartet.runtime.guard import Announced, Guard, Service
from quartet.runtime.messages import Generate, Message, Restarted, Tokens, process_key, unpack_ids
from quartet.runtime.service import Sender
from quartet.runtime.sockets import decode, encode
from quartet.tokenizer_service.encode import Encoder
from quartet.tokenizer_service.way_out import Crossroads
from tests.fakes import AtOnce
from tests.simulated_ring.links import Inbox, Link

TOKENIZER, SCHEDULER, DETOKENIZER, GATEWAY = "tokenizer", "scheduler", "detokenizer", "gateway"
ROLES = (TOKENIZER, SCHEDULER, DETOKENIZER, GATEWAY)
POISON = {TOKENIZER: 397, SCHEDULER: 398, DETOKENIZER: 399}  # the last id of a prompt that ends this role
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

    @property
    def doomed(self) -> bool:
        """Whether its death is due."""
        return self.points_left is not None or self.hung

    def end(self) -> None:
        """It has died: what runs beside it ends too."""

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
