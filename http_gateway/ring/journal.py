"""What the gateway knows of an unfinished request, so that it is not lost with a process of the ring.

An entry holds all that is needed to send the request again and to continue behind the output that its client has.
Whatever comes back for an older attempt is dropped, so no output is sent twice.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from quartet.runtime.control import Abort
from quartet.runtime.messages import Generate, Request

if TYPE_CHECKING:
    from quartet.http_gateway.ring.request_group import RequestGroup


@dataclass(slots=True)
class Deaths:
    """Deaths of one service in a row, without progress of the request between them."""

    count: int = 0
    proof_bytes: int = 0  # of `JournalEntry.delivered`: beyond it, the request has made progress


@dataclass(slots=True, eq=False)
class JournalEntry:
    """The journal entry of one unfinished request."""

    generate: Generate
    parent: str  # the rid that the client gave, where several requests were made from it
    group: "RequestGroup | None"  # None: its client has gone, only the terminal message is awaited
    index: int
    serial: int  # order of arrival, among commands too
    sent_at: float
    attempt: int = 0
    rank: int = 0  # of the scheduler that it is sent to
    again: bool = False  # this is not its first attempt
    in_ring: bool = False  # the attempt was sent, as far as can be known
    heard: bool = False  # and something has come back
    known: bool = False  # the scheduler may have an attempt of it, this one or an earlier one
    requested_abort: Abort | None = None  # what asked for its end
    delivered: bytearray = field(default_factory=bytearray)  # output ids handed to the endpoint, int32
    last_heard_at: float = 0.0  # 0: nothing yet
    prompt_tokens: int = 0
    cached_tokens: int = 0
    deaths: dict[str, Deaths] = field(default_factory=dict)  # by role, while this was in the ring

    @property
    def request(self) -> Request:
        return self.generate.request

    @property
    def rid(self) -> str:
        return self.generate.request.rid

    def message(self, epoch: int) -> Generate:
        """The request as it is to be sent now, to its scheduler, which has this epoch."""
        if not (self.attempt or self.rank):  # nothing was ever started again
            return self.generate
        request = msgspec.structs.replace(
            self.request,
            attempt=self.attempt,
            rank=self.rank,
            epoch=epoch,
            again=self.again,
            resume_ids=self.request.resume_ids + bytes(self.delivered),
        )
        return msgspec.structs.replace(self.generate, request=request)

    def withdraw(self, attempt: int) -> None:
        """Drop the attempt that is in the ring; the one with this number is to be sent."""
        self.again = self.again or self.in_ring
        self.in_ring = self.heard = False
        self.attempt = attempt

    def abort(self, message: str = "") -> Abort:
        """The command that ends it in the scheduler."""
        return Abort(rid=self.rid, exact=True, abort_message=message, rank=self.rank)


def request_digest(generate: Generate) -> bytes:
    """Equal for requests that differ in their rids and seeds only."""
    anonymous = msgspec.structs.replace(
        generate.request, rid="", call="", seed=0, attempt=0, again=False, resume_ids=b""
    )
    content = msgspec.msgpack.encode(msgspec.structs.replace(generate, request=anonymous, times=None))
    return hashlib.blake2b(content, digest_size=16).digest()


def names_adapter(unfinished: Mapping[str, JournalEntry], rank: int, adapter: str) -> bool:
    """Whether one of these requests is a scheduler's and names an adapter."""
    return any(entry.rank == rank and entry.request.adapter == adapter for entry in unfinished.values())


def is_lost(entry: JournalEntry, role: str, rank: int) -> bool:
    """Whether a request may be lost with a service that has died, of schedulers with that of `rank`."""
    match role:
        case "tokenizer":
            return not entry.heard
        case "scheduler":
            return entry.rank == rank
        case _:
            return True
