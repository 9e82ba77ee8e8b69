"""What is sent and what is noted: plain values, so that figures are made of them without a clock or a server."""

from dataclasses import dataclass, field

import msgspec


class Turn(msgspec.Struct, frozen=True):
    """One request of a session: what is new in its prompt, and how long its answer shall be."""

    text: str
    output_tokens: int
    ids: tuple[int, ...] = ()  # the same prompt as token ids, where it was made of random ones


Session = tuple[Turn, ...]  # turns after another; each prompt begins with all that was said before


@dataclass
class History:
    """What was said in a session so far, in the three forms that the APIs take."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)


class Record(msgspec.Struct):
    """One request as its client saw it. Times are seconds of one clock."""

    sent_at: float
    first_at: float | None = None  # the first part of the answer
    last_at: float | None = None  # the last part of the answer
    ended_at: float | None = None
    gaps: list[float] = []  # between parts
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""  # why it failed

    @property
    def ttft(self) -> float | None:
        """Time to the first token, in seconds."""
        return None if self.first_at is None else self.first_at - self.sent_at

    @property
    def tpot(self) -> float | None:
        """Time per output token behind the first, in seconds."""
        if self.first_at is None or self.last_at is None or self.completion_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.completion_tokens - 1)

    @property
    def e2e(self) -> float | None:
        """Time of the whole request, in seconds."""
        return None if self.ended_at is None else self.ended_at - self.sent_at

    def arrived(self, now: float) -> None:
        """Note that a part of the answer came."""
        if self.first_at is None or self.last_at is None:
            self.first_at = now
        else:
            self.gaps.append(now - self.last_at)
        self.last_at = now


class Run(msgspec.Struct):
    """All requests of one run, in the order in which they ended."""

    url: str
    records: list[Record] = []
    interrupted: bool = False
