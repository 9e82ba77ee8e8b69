"""A tier whose blocks lie in parts on several ranks: a block counts when all have theirs."""

import pytest

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.core.tier_acts import Act, Brought, CarryOut, DropFile, ReadFiles, Store, Written
from quartet.scheduler_service.execution.rank_messages import (
    Answer,
    Channel,
    Message,
    OpenTier,
    Tier,
    TierReport,
    UseTier,
)
from quartet.scheduler_service.execution.rank_tier import FollowingTier, LeadingPart
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.host.parallel import Parallel

STORE = Store(b"k", [1], 7, False, True)


class FakePart:
    """A part that does nothing, and says what the test wants."""

    is_there = True

    def __init__(self, known: list[bytes] | None = None) -> None:
        self.known = known or []
        self.done: list[Act] = []
        self.ended: list[Written | Brought] = []

    def open(self, identity: bytes) -> list[bytes]:
        return self.known

    def do(self, act: Act) -> None:
        self.done.append(act)

    def results(self) -> list[Written | Brought]:
        ended, self.ended = self.ended, []
        return ended

    def flush(self) -> None:
        """Nothing waits."""


class Scripted(Channel):
    """The channel of a rank whose words are known."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.script: list[Message] = []

    def send(self, message: Message) -> None:
        self.heard.append(message)

    def receive(self, most_bytes: int = 0) -> Message | None:
        return self.script.pop(0) if self.script else None

    def waits(self, timeout_s: float) -> bool:
        return bool(self.script)


def ranks(own: FakePart, others: int = 1) -> tuple[LeadingPart, list[Scripted]]:
    channels = [Scripted() for _ in range(others)]
    return LeadingPart(own, Followers(Parallel(0, others + 1), channels)), channels


def test_blocks_that_one_rank_lacks_are_dropped_by_all() -> None:
    own = FakePart([b"c", b"a", b"b"])
    part, (other,) = ranks(own)
    other.script = [Answer([b"b", b"c", b"d"])]
    assert part.open(b"i") == [b"c", b"b"], "in the order of rank 0"
    part.flush()
    drops = CarryOut([DropFile(b"a"), DropFile(b"d")])
    assert own.done == [drops] and other.heard == [UseTier(b"i"), Tier([drops], False)]


def test_a_rank_that_cannot_open_its_directory_ends_the_start() -> None:
    part, (other,) = ranks(FakePart())
    other.script = [Answer(refusal="--kv-cache-dir cannot be used: Permission denied")]
    with pytest.raises(StartupError, match=r"Permission denied \(rank 1\)"):
        part.begin(OpenTier(64, 0, 2, 2, "d"))


def test_a_block_is_written_when_all_have_written_theirs() -> None:
    own = FakePart()
    part, others = ranks(own, 2)
    part.do(CarryOut([STORE]))
    part.flush()
    assert all(other.heard == [Tier([CarryOut([STORE])], True)] for other in others)
    own.ended = [Written(b"k", 7, True)]
    assert list(part.results()) == []
    others[0].script = [TierReport([Written(b"k", 7, True)], [])]
    others[1].script = [TierReport([], [])]
    assert list(part.results()) == []
    part.flush()
    assert others[1].heard[-1] == Tier([], True), "asked again once both have reported"
    others[1].script = [TierReport([Written(b"k", 7, False)], [])]
    assert list(part.results()) == [Written(b"k", 7, False)], "one that could not is enough"


def test_one_report_is_asked_for_at_a_time() -> None:
    part, (other,) = ranks(FakePart())
    part.do(CarryOut([STORE]))
    for _ in range(3):
        part.flush()
    assert len(other.heard) == 1


def test_a_read_has_brought_what_all_have_read() -> None:
    own = FakePart()
    part, (other,) = ranks(own)
    part.do(ReadFiles(9, [b"a", b"b", b"c"]))
    part.flush()
    own.ended = [Brought(9, 3)]
    other.script = [TierReport([], [Brought(9, 1, b"b")])]
    assert list(part.results()) == [Brought(9, 1, b"b")]


def test_reports_that_come_before_an_answer_are_not_lost() -> None:
    own = FakePart()
    part, (other,) = ranks(own)
    part.do(CarryOut([STORE]))
    part.flush()
    own.ended = [Written(b"k", 7, True)]
    other.script = [TierReport([Written(b"k", 7, True)], []), Answer(["facts"])]
    assert part.begin(OpenTier(64, 0, 2, 2, None)) == [["facts"]]
    assert list(part.results()) == [Written(b"k", 7, True)]


def test_a_rank_that_has_ended_is_an_error() -> None:
    part, (other,) = ranks(FakePart())
    other.waits = lambda timeout_s: True  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        list(part.results())


def test_another_rank_does_what_it_is_told_and_reports_when_it_is_asked() -> None:
    part = FakePart([b"a"])
    tier = FollowingTier(part)
    assert tier.open(b"i") == Answer([b"a"])
    part.ended = [Written(b"k", 7, True), Brought(9, 1)]
    assert tier.do(Tier([ReadFiles(9, [b"a"])], False)) is None
    assert tier.do(Tier([], True)) == TierReport([Written(b"k", 7, True)], [Brought(9, 1)])
    assert part.done == [ReadFiles(9, [b"a"])]
