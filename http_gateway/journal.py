"""What the gateway knows of every unfinished request, so that none is lost with a process of the ring.

An entry holds all that is needed to send a request again, to go on behind what its client has. Whatever comes back for
an older attempt is dropped, so nothing is said twice.

A request may itself be what ends a process. One that was in the ring at two deaths of the same service, and made
nothing to speak of between them, is a suspect: it runs while all others wait, until it has got beyond the point where
it was at the last death. If that service dies under it again, it alone fails.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from runtime.control import Abort
from runtime.messages import Generate, Request

if TYPE_CHECKING:
    from http_gateway.flight import Flight

ID_BYTES = 4
SUSPICIOUS_DEATHS = 2
PROOF_TOKENS = 8  # made since a death: it was not this request's fault
GUILTY = "The {role} ended three times while it served this request, the last time alone; the request is given up."


@dataclass(slots=True)
class Deaths:
    """Those of one service in a row, without progress of the request between them."""

    count: int = 0
    proof_bytes: int = 0  # of `Pending.delivered`: so much is progress


@dataclass(slots=True, eq=False)
class Pending:
    """The journal entry of one unfinished request."""

    generate: Generate
    parent: str  # the rid that the client gave, where the request is one of several made from it
    flight: "Flight | None"  # None: its client has gone, only the terminal message is awaited
    index: int
    sent_at: float
    attempt: int = 0
    in_ring: bool = False  # sent, as far as can be known
    unwanted: Abort | None = None  # how somebody asked for its end
    delivered: bytearray = field(default_factory=bytearray)  # output ids handed to the endpoint, int32
    last_heard_at: float = 0.0  # 0: nothing yet
    prompt_tokens: int = 0
    cached_tokens: int = 0
    deaths: dict[str, "Deaths"] = field(default_factory=dict)  # by role, while this was in the ring

    @property
    def request(self) -> Request:
        return self.generate.request

    def message(self) -> Generate:
        """The request as it is to be sent now."""
        if not self.attempt and not self.delivered:
            return self.generate
        request = msgspec.structs.replace(self.request, attempt=self.attempt, resume_ids=bytes(self.delivered))
        return msgspec.structs.replace(self.generate, request=request)


class Quarantine:
    """Which suspect runs while all others wait."""

    def __init__(self) -> None:
        self.alone: Pending | None = None
        self._role = ""  # whose death it is suspected of
        self._suspects: deque[tuple[Pending, str]] = deque()

    def died(self, role: str, lost: Collection[Pending]) -> Pending | None:
        """A service has died with these. Returns the request that is to blame, where that is known."""
        guilty = self.alone if self.alone in lost and self._role == role else None
        for entry in lost:
            if entry is guilty or not entry.in_ring:
                continue
            deaths = entry.deaths.setdefault(role, Deaths())
            deaths.count = 1 if len(entry.delivered) >= deaths.proof_bytes else deaths.count + 1
            deaths.proof_bytes = len(entry.delivered) + PROOF_TOKENS * ID_BYTES
            if deaths.count >= SUSPICIOUS_DEATHS:
                self._suspects.append((entry, role))
        if guilty:
            self.alone = None
        return guilty

    def admits(self, entry: Pending) -> bool:
        """Whether the entry may be sent now."""
        return self.alone is None or self.alone is entry

    def clears(self, entry: Pending, ended: bool) -> bool:
        """Something was heard of the entry: whether that ends its time alone."""
        if entry is not self.alone:
            return False
        if not ended and len(entry.delivered) < entry.deaths[self._role].proof_bytes:
            return False
        self.alone = None
        return True

    def advance(self, unfinished: Iterable[Pending]) -> None:
        """Choose the next suspect that is still there; without one everybody may run."""
        there = set(unfinished)
        while self._suspects and self.alone is None:
            suspect, self._role = self._suspects.popleft()
            self.alone = suspect if suspect in there else None
