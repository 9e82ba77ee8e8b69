import pytest

from quartet.http_gateway.ring.aborts import RELAYED_ABORTS, RelayedAborts, abort_finish, matches
from quartet.http_gateway.ring.journal import JournalEntry
from quartet.runtime.control import Abort
from quartet.runtime.messages import ABORTED, Finish, Generate, Request
from quartet.runtime.sampling import SamplingParams


def entry(rid: str, parent: str = "", serial: int = 1) -> JournalEntry:
    return JournalEntry(Generate(request=Request(rid=rid, params=SamplingParams())), parent, None, 0, serial, 0.0, 0)


@pytest.mark.parametrize(
    ("command", "matched"),
    [
        (Abort(rid="a"), True),
        (Abort(rid="a_1"), True),
        (Abort(rid="a_"), False),
        (Abort(rid="a", exact=True), False),
        (Abort(rid="a_1", exact=True), True),
        (Abort(rid="a_", prefix=True), True),
        (Abort(rid="b", prefix=True), False),
        (Abort(), False),
        (Abort(abort_all=True), True),
    ],
)
def test_an_abort_matches_a_request_by_its_own_rid_its_parents_or_a_prefix(command: Abort, matched: bool) -> None:
    assert matches(command, entry("a_1", parent="a")) is matched


def test_the_reason_of_an_abort_becomes_the_end() -> None:
    assert abort_finish(Abort(rid="a", abort_message="over")) == Finish(reason="abort", message="over")
    assert abort_finish(Abort(rid="a")) == Finish(reason="abort", message=ABORTED)


def test_relayed_aborts_are_repeated_until_their_rid_is_another_request() -> None:
    relayed, old, new = RelayedAborts(), entry("a", serial=1), entry("a", serial=9)
    abort = Abort(rid="a", exact=True)
    relayed.note(5, abort)
    assert relayed.to_repeat({}, set()) == [abort]
    assert relayed.to_repeat({"a": old}, set()) == [abort]
    assert relayed.to_repeat({"a": old}, {"a"}) == []  # it is sent again, and its stop string met again
    assert relayed.to_repeat({"a": new}, set()) == []
    relayed.forget(0)
    assert relayed.to_repeat({}, set()) == []


def test_only_the_last_relayed_aborts_are_kept() -> None:
    relayed = RelayedAborts()
    for serial in range(RELAYED_ABORTS + 1):
        relayed.note(serial, Abort(rid=str(serial)))
    assert [abort.rid for abort in relayed.to_repeat({}, set())] == [str(1 + i) for i in range(RELAYED_ABORTS)]
