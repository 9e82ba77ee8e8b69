"""The two ends of the ring that a scheduler has, as its loop uses them."""

from collections.abc import Sequence
from typing import Any, Protocol

from quartet.runtime.messages import Message


class Receiver(Protocol):
    def recv(self, timeout_s: float | None = 0.0) -> list[Any]: ...


class Sender(Protocol):
    def send(self, messages: Sequence[Message]) -> None: ...
