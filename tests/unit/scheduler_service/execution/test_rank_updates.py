"""All ranks take new weights, or none does: rank 0 against another rank that answers what the test wants."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quartet.runtime.control import InitWeightsUpdateGroup, UpdateWeightsFromDistributed
from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.execution.rank_messages import (
    Answer,
    Channel,
    Commit,
    FromDisk,
    GiveUp,
    JoinGroup,
    LeaveGroup,
    Meet,
    Message,
    Part,
    Randomize,
    Reread,
    Snapshot,
    TierReport,
    as_bytes,
)
from quartet.scheduler_service.execution.rank_updates import LeadingUpdates
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.weights import distributed, record
from quartet.scheduler_service.weights.manifest import manifest_of
from tests import checkpoints
from tests.configs import resolved

HEAD = "lm_head.weight"
PATIENCE_S = 60.0


class Scripted(Channel):
    """The channel of a rank whose answers are known."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.script: list[Message] = []

    def send(self, message: Message) -> None:
        self.heard.append(message)

    def receive(self) -> Message | None:
        return self.script.pop(0) if self.script else None

    def waits(self, timeout_s: float) -> bool:
        return bool(self.script)


@pytest.fixture
def other() -> Scripted:
    return Scripted()


@pytest.fixture
def updates(tmp_path: Path, other: Scripted) -> LeadingUpdates:
    directory = checkpoints.version_model(tmp_path / "served", 5)
    config = resolved(model_path=str(directory), model_dir=str(directory))
    live = checkpoints.loaded(directory)
    return LeadingUpdates(live, config, str(tmp_path), lambda _: None, Followers(Parallel(0, 2), [other]))


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return checkpoints.version_model(tmp_path / "new", 9)


def served_token(updates: LeadingUpdates) -> int:
    return int(updates.live.view(HEAD).sum(1).argmax())


def test_what_all_ranks_have_staged_is_committed_by_all(updates: LeadingUpdates, other: Scripted, new: Path) -> None:
    other.script = [Answer(record.files_of(new))]
    updates.swap(updates.from_disk(str(new), "auto", None), "2")
    assert other.heard == [FromDisk(str(new), "auto"), Commit()]
    assert served_token(updates) == 9


def test_what_is_not_served_after_all_the_others_drop(updates: LeadingUpdates, other: Scripted, new: Path) -> None:
    other.script = [Answer(record.files_of(new))]
    updates.from_disk(str(new), "auto", None)
    updates.drop_staged()
    assert other.heard == [FromDisk(str(new), "auto"), GiveUp()]


def test_one_ranks_refusal_is_everybodys(updates: LeadingUpdates, other: Scripted, new: Path) -> None:
    other.script = [Answer(refusal="no room.", status=400)]
    with pytest.raises(CommandRefused, match=r"no room\. \(rank 1\)"):
        updates.from_disk(str(new), "auto", None)
    assert other.heard[-1] == GiveUp()
    assert served_token(updates) == 5


def test_what_rank_0_refuses_the_others_drop(updates: LeadingUpdates, other: Scripted, new: Path) -> None:
    other.script = [Answer({})]
    (new / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CommandRefused):
        updates.from_disk(str(new), "auto", None)
    assert other.heard[-1] == GiveUp() and not other.script


def test_files_that_change_between_two_ranks_are_refused(updates: LeadingUpdates, other: Scripted, new: Path) -> None:
    other.script = [Answer({"model.safetensors": [1, 2]})]
    with pytest.raises(CommandRefused, match="were changed while the ranks read them"):
        updates.from_disk(str(new), "auto", None)
    assert other.heard[-1] == GiveUp()


def test_all_ranks_get_the_manifest_and_one_wrong_digest_is_everybodys(
    updates: LeadingUpdates, other: Scripted, new: Path
) -> None:
    digests = manifest_of(new)
    other.script = [Answer(record.files_of(new))]
    updates.swap(updates.from_disk(str(new), "auto", digests), "2")
    assert other.heard == [FromDisk(str(new), "auto", digests), Commit()]
    other.script = [Answer(record.files_of(new))]
    with pytest.raises(CommandRefused, match=f"tensor {HEAD} hashes to"):
        updates.from_disk(str(new), "auto", digests | {HEAD: "00"})
    assert other.heard[-1] == GiveUp()


def test_random_values_are_those_of_one_seed(updates: LeadingUpdates, other: Scripted) -> None:
    other.script = [Answer(), Answer()]
    values = []
    for _ in range(2):
        updates.swap(updates.randomized([HEAD], seed=7), "2")
        values.append(updates.live.view(HEAD).clone())
    assert torch.equal(*values) and other.heard[0] == Randomize([HEAD], 7)


def test_files_that_change_before_they_are_read_again_are_refused(updates: LeadingUpdates, other: Scripted) -> None:
    other.script = [Answer({"model.safetensors": [1, 2]})]
    with pytest.raises(CommandRefused, match="were changed while the ranks read them"):
        updates.reread()
    assert other.heard == [Reread(), GiveUp()]


def test_a_trainers_group_must_have_room_for_all_ranks(updates: LeadingUpdates, other: Scripted) -> None:
    command = InitWeightsUpdateGroup(
        id="", master_address="127.0.0.1", master_port=1, rank_offset=1, world_size=2, group_name="g", backend="gloo"
    )
    with pytest.raises(CommandRefused, match="ranks 1 to 2 of 2: the trainer is rank 0, and --tp-size 2 takes"):
        updates.join_group(command)
    assert other.heard == []


def test_ranks_that_have_joined_leave_when_one_could_not(
    updates: LeadingUpdates, other: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "join", lambda spec: "group")
    left: list[str] = []
    monkeypatch.setattr(distributed, "leave", left.append)
    command = InitWeightsUpdateGroup(
        id="", master_address="127.0.0.1", master_port=1, rank_offset=1, world_size=3, group_name="g", backend="gloo"
    )
    answers = [Answer(refusal="no trainer", meeting=0), Answer(meeting=1)]

    def told(message: Message) -> None:
        other.heard.append(message)
        other.script.append(answers.pop(0))

    monkeypatch.setattr(other, "send", told)
    with pytest.raises(CommandRefused, match=r"no trainer \(rank 1\)"):
        updates.join_group(command)
    assert other.heard == [Meet(0, JoinGroup(command)), Meet(1, LeaveGroup("g"))]
    assert left == ["group"] and not updates.groups


def test_ranks_that_wait_for_a_trainer_answer_other_questions_meanwhile() -> None:
    own, theirs = map(Channel, socket.socketpair())
    followers = Followers(Parallel(0, 2), [own])
    with ThreadPoolExecutor() as threads:
        met = threads.submit(followers.meet, LeaveGroup("g"), lambda: None)
        assert theirs.receive() == Meet(0, LeaveGroup("g")) and not followers.busy
        for value, words in (("first", [Answer("first")]), ("last", [Answer(meeting=0), Answer("last")])):
            asked = threads.submit(followers.together, Part(HEAD), lambda: 0)
            assert theirs.receive() == Part(HEAD) and not met.done()
            for word in words:
                theirs.send(word)
            assert asked.result(PATIENCE_S) == (0, [value])
        met.result(PATIENCE_S)


def test_a_group_is_met_while_the_trainer_of_another_does_not_come() -> None:
    own, theirs = map(Channel, socket.socketpair())
    followers = Followers(Parallel(0, 2), [own])
    with ThreadPoolExecutor() as threads:
        waits, met = (threads.submit(followers.meet, LeaveGroup(name), lambda: None) for name in ("absent", "there"))
        told = [theirs.receive() for _ in range(2)]
        numbers = {meet.task.name: meet.number for meet in told if isinstance(meet, Meet)}
        theirs.send(Answer(meeting=numbers["there"]))
        met.result(PATIENCE_S)
        assert not waits.done()
        theirs.send(Answer(refusal="no trainer", meeting=numbers["absent"]))
        with pytest.raises(CommandRefused, match=r"no trainer \(rank 1\)"):
            waits.result(PATIENCE_S)


def test_the_refusal_of_a_rank_that_could_not_meet_the_trainer_is_told(other: Scripted) -> None:
    other.script = [TierReport([], []), Answer(refusal="no trainer", status=503, meeting=0)]
    followers = Followers(Parallel(0, 2), [other])
    with pytest.raises(CommandRefused, match=r"no trainer \(rank 1\)") as refused:
        followers.meet(LeaveGroup("g"), lambda: None)
    assert refused.value.status == 503 and list(followers.reports()) == [TierReport([], [])]


def test_copies_that_differ_between_ranks_are_an_error(updates: LeadingUpdates, other: Scripted) -> None:
    other.script = [Answer("another checksum")]
    with pytest.raises(CommandRefused, match=r"rank 1 has another .* than rank 0"):
        updates.inspection.checksums([HEAD])
    assert other.heard == [Part(HEAD)]


def test_a_session_is_broken_by_any_error_after_which_the_others_have_dropped_theirs(
    updates: LeadingUpdates, other: Scripted, new: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_file({HEAD: checkpoints.version_tensors(new, 9)[HEAD]}, tmp_path / "bucket")
    updates.groups["g"] = object()  # type: ignore[assignment]
    updates.open_session()
    other.script = [Answer(), Answer()]
    updates.payload([str(tmp_path / "bucket")], None)()

    def receive(*of: object) -> None:
        raise TypeError("not a size")

    monkeypatch.setattr(distributed, "receive_named", receive)
    shape = list(updates.live.layout.whole_shape(HEAD))
    command = UpdateWeightsFromDistributed(id="", names=[HEAD], dtypes=["float32"], shapes=[shape], group_name="g")
    with pytest.raises(TypeError, match="not a size"):
        updates.broadcast(command)()
    assert other.heard[-1] == GiveUp()
    assert updates.session is not None and updates.session.broken == "Internal error: TypeError"


def test_a_refused_inspection_gives_nothing_up(updates: LeadingUpdates, other: Scripted) -> None:
    updates.open_session()
    other.script = [Answer(refusal="no memory", status=500)]
    with pytest.raises(CommandRefused, match=r"no memory \(rank 1\)"):
        updates.inspection.take_snapshot([HEAD])
    assert other.heard == [Snapshot([HEAD])]
    assert updates.session is not None and not updates.session.broken


def test_a_rank_that_ends_while_it_is_asked_is_no_answer(updates: LeadingUpdates, new: Path) -> None:
    with pytest.raises(ConnectionError):
        updates.from_disk(str(new), "auto", None)
    assert served_token(updates) == 5


def test_bytes_of_a_part_are_those_of_its_rows(updates: LeadingUpdates) -> None:
    whole = updates.live.view(HEAD)
    assert as_bytes(whole[:3]) + as_bytes(whole[3:]) == as_bytes(whole)
    assert as_bytes(whole[:, :2]) == whole[:, :2].contiguous().numpy().tobytes()
