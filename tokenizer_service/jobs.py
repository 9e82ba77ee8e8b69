"""What waits in the tokenizer: messages whose texts are still to be encoded, piece by piece."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING

import msgspec

from quartet.runtime.control import Tokenize
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, Message
from quartet.tokenizer_service.prompts import Prompt

if TYPE_CHECKING:
    from tokenizers import Encoding

CHARS_PER_MESSAGE = 256  # that take about as long to encode as a message to render

Key = tuple[type, str]  # of a message that waits: its kind, and its rid or id


@dataclass(frozen=True, slots=True)
class Pace:
    """How much one step does."""

    step_chars: int = 1 << 16
    step_s: float = 0.02  # after which a step begins nothing new
    long_chars: int = 1 << 16  # of a text that is encoded in the background


@dataclass(eq=False, slots=True)
class Job:
    """A message that waits, and what has come of its texts."""

    message: Generate | Tokenize
    slot: list[Message] | None  # takes the answer during the step in which it came in; None: that step is over
    results: "list[Encoding | RequestError | None]"
    missing: int
    cancelled: Event = field(default_factory=Event)

    @property
    def call(self) -> Hashable:
        """The call that the job belongs to, for the fair queue."""
        message = self.message
        return message.id if isinstance(message, Tokenize) else message.request.call or message.request.rid


@dataclass(eq=False, slots=True)
class Piece:
    """One text of a job."""

    job: Job
    index: int
    prompt: Prompt | None = None


def key_of(message: Generate | Tokenize) -> Key:
    return type(message), message.id if isinstance(message, Tokenize) else message.request.rid


def is_heavy(piece: Piece, limit: int) -> bool:
    """Whether a piece is a conversation that takes as long to render as a text of so many characters to encode."""
    message = piece.job.message
    is_last = isinstance(message, Generate) or piece.index == len(message.texts)
    chat = message.chat if is_last else None
    if chat is None:
        return False
    size = CHARS_PER_MESSAGE * len(chat.messages)
    try:
        return size > limit or size + len(msgspec.msgpack.encode(chat)) > limit
    except (ValueError, OverflowError, RecursionError):  # it will be refused, for the same reason
        return False


def chars_of(prompt: Prompt) -> int:
    return len(prompt.text) if isinstance(prompt.text, str) else sum(map(len, prompt.text))
