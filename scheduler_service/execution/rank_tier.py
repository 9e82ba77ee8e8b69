"""The tier behind the KV pool of a model that several ranks compute: each has its part of every block.

Rank 0 has the books, and tells the others what its own part is told, in the same order and at the same place between
the steps. So the same blocks are in memory everywhere. A block is in its file when all ranks have written theirs, and a
read has brought what all have read. The others report only when they are asked, one report at a time, so nobody waits
for a channel that is full.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from quartet.runtime.errors import CommandRefused, StartupError
from quartet.scheduler_service.core.tier_acts import (
    Act,
    Brought,
    CarryOut,
    DropFile,
    ReadFiles,
    Store,
    TierPart,
    Written,
)
from quartet.scheduler_service.execution.rank_messages import Answer, OpenTier, Tier, TierReport, UseTier
from quartet.scheduler_service.execution.ranks import Followers


class OpenPart(TierPart, Protocol):
    """A part that can be opened."""

    def open(self, identity: bytes) -> list[bytes]:
        """Keep KV of this identity; the blocks whose files are there. Raises OSError."""
        ...


@dataclass(slots=True)
class Votes:
    """What the ranks have said of one write or read so far."""

    waiting: int  # for so many ranks
    ok: bool = True
    least: Brought | None = None  # of the rank that has read the fewest blocks


class LeadingPart:
    """The parts of all ranks, as rank 0 has them."""

    def __init__(self, own: OpenPart, followers: Followers) -> None:
        self._own, self._followers = own, followers
        self._untold: list[Act] = []
        self._votes: dict[int, Votes] = {}  # by serial of a write, or number of a read: both come from one count
        self._reports = 0  # that the others have been asked for and not sent

    def begin(self, opening: OpenTier) -> list[str]:
        """Have the others prepare their parts; what their KV follows from. Raises StartupError."""
        return self._asked(opening, lambda: None)[1]

    def open(self, identity: bytes) -> list[bytes]:
        """Keep KV of this identity; returns the blocks that all ranks have, and drops the others.

        Raises StartupError, and OSError for this rank's files.
        """
        own, theirs = self._asked(UseTier(identity), partial(self._own.open, identity))
        common = set(own).intersection(*theirs)
        if lacking := sorted(set(own).union(*theirs) - common):
            self.do(CarryOut([DropFile(key) for key in lacking]))
        return [key for key in own if key in common]

    def _asked(self, task: OpenTier | UseTier, own: Callable[[], Any]) -> tuple[Any, list[Any]]:
        try:
            return self._followers.together(task, own)
        except CommandRefused as refusal:
            raise StartupError(refusal.message) from refusal

    @property
    def is_there(self) -> bool:
        """See TierPart.is_there: all ranks give it back together."""
        return self._own.is_there

    def do(self, act: Act) -> None:
        """See TierPart.do."""
        ranks = len(self._followers.channels) + 1
        match act:
            case CarryOut(commands):
                for command in commands:
                    if isinstance(command, Store) and command.file:
                        self._votes[command.serial] = Votes(ranks)
            case ReadFiles(number):
                self._votes[number] = Votes(ranks)
        self._own.do(act)
        self._untold.append(act)

    def results(self) -> Iterator[Written | Brought]:
        """See TierPart.results."""
        for result in self._own.results():
            yield from self._count(result)
        for report in self._followers.reports():
            self._reports -= 1
            for told in (*report.written, *report.brought):
                yield from self._count(told)

    def _count(self, result: Written | Brought) -> Iterator[Written | Brought]:
        """The result of all ranks, once this is the last one."""
        number = result.serial if isinstance(result, Written) else result.number
        votes = self._votes[number]
        votes.waiting -= 1
        if isinstance(result, Written):
            votes.ok = votes.ok and result.ok
        elif votes.least is None or result.good < votes.least.good:
            votes.least = result
        if votes.waiting:
            return
        del self._votes[number]
        yield Written(result.key, number, votes.ok) if isinstance(result, Written) else votes.least or result

    def flush(self) -> None:
        """See TierPart.flush. Raises OSError when a rank has ended."""
        report = bool(self._votes) and not self._reports
        if not (self._untold or report):
            return
        acts, self._untold = self._untold, []
        self._reports += len(self._followers.channels) if report else 0
        self._followers.tell(Tier(acts, report))


class FollowingTier:
    """The part of a rank other than 0, which does what it is told."""

    def __init__(self, part: OpenPart) -> None:
        self._part = part

    def open(self, identity: bytes) -> Answer:
        """See UseTier."""
        try:
            return Answer(self._part.open(identity))
        except OSError as error:
            return Answer(refusal=f"--kv-cache-dir cannot be used: {error.strerror}")

    def do(self, message: Tier) -> TierReport | None:
        """Do what is said, and report if that is wanted."""
        for act in message.acts:
            self._part.do(act)
        if not message.report:
            return None
        results = list(self._part.results())
        written = [result for result in results if isinstance(result, Written)]
        return TierReport(written, [result for result in results if isinstance(result, Brought)])
