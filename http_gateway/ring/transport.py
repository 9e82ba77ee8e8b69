"""What the ring client is given to send, receive and count with, and how a refusal to send becomes a client's error."""

from collections.abc import Sequence
from typing import Any, Protocol

from quartet.http_gateway.ring.journal import JournalEntry
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Message, Text
from quartet.runtime.sockets import FrameTooLarge

OUT_OF_RANGE = "A number in the request is out of range."


class Meter(Protocol):
    """What the gateway counts of each request (http_gateway/http/metrics.py)."""

    def count_delta(self, entry: JournalEntry, text: Text, now: float) -> None: ...


class Receiver(Protocol):
    async def recv(self) -> list[Any]: ...


class Sender(Protocol):
    def send(self, messages: Sequence[Message]) -> None: ...


def send_frame(outbox: Sender, messages: Sequence[Message]) -> None:
    """Send messages in one frame. Raises RequestError for what cannot be sent."""
    try:
        outbox.send(messages)
    except FrameTooLarge as error:
        raise RequestError(f"The request is too large: {error}.", Kind.TOO_LARGE) from error
    except OverflowError as error:  # an integer of more than 64 bits
        raise RequestError(OUT_OF_RANGE) from error
