import logging

import pytest

from quartet.runtime.control import PauseGeneration
from quartet.runtime.messages import Facts, Finish, Reply, Restarted, unpack_ids
from quartet.scheduler_service.core.drafts import DraftOptions
from quartet.scheduler_service.scheduler import GRAMMAR_POLL_S, IDLE_BEAT_S
from quartet.scheduler_service.step_queue import MOST_FAILURES
from tests.fakes import looping_token
from tests.rig import PROMPT, Rig
from tests.stepper import VOCABULARY, expected_output, tokenized


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_becomes_one_message_a_step_and_a_last_one(depth: int) -> None:
    rig = Rig(depth)
    rig.inbox.put(tokenized("a", PROMPT, 3, attempt=2))
    rig.run()
    messages = rig.tokens("a")
    assert [list(unpack_ids(m.ids)) for m in messages] == [[token] for token in expected_output(PROMPT, 3)]
    assert [m.finish is not None for m in messages] == [False, False, True]
    assert {(m.attempt, m.prompt_tokens, m.weight_version) for m in messages} == {(2, 7, "default")}


def test_all_requests_of_a_step_travel_in_one_frame() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", [10], 2), tokenized("b", [20], 2))
    rig.run()
    assert [[m.rid for m in frame] for frame in rig.outbox.frames] == [["a", "b"], ["a", "b"]]


def test_a_refused_request_gets_one_message_and_does_not_affect_others() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("bad", [VOCABULARY]), tokenized("good", PROMPT, 2))
    rig.run()
    (rejected,) = rig.tokens("bad")
    assert rejected.finish is not None and (rejected.finish.reason, rejected.finish.status) == ("error", 400)
    assert rejected.request is not None
    assert len(rig.tokens("good")) == 2


def test_a_message_for_another_service_is_sent_on() -> None:
    rig = Rig()
    facts = Facts(max_total_num_tokens=1, max_req_input_len=1, context_length=1, vocab_size=1)
    rig.inbox.put(Reply(id="x"), facts)
    rig.run()
    assert rig.outbox.messages == [Reply(id="x"), facts]


def test_facts_have_the_state_of_when_they_are_sent() -> None:
    rig = Rig()
    rig.scheduler.facts = Facts(max_total_num_tokens=1, max_req_input_len=1, context_length=1, vocab_size=1)
    rig.inbox.put(Restarted(role="gateway"), PauseGeneration(id="p"))  # the pause makes older facts wrong
    rig.run()
    facts = [message for message in rig.outbox.messages if isinstance(message, Facts)]
    assert facts and all(message.state["paused"] for message in facts)


def test_an_idle_scheduler_waits_for_its_inbox_and_still_beats() -> None:
    rig = Rig()
    rig.scheduler.step()
    assert rig.inbox.waits == [IDLE_BEAT_S]
    assert rig.progress.beats == [False]


class WaitsForFiles:
    """A tier whose requests wait for files."""

    holds_up = True
    turns = 0

    def plan(self, now: float) -> None:
        """Nothing can run yet."""
        self.turns += 1


def test_a_scheduler_whose_requests_wait_for_files_looks_for_them_often() -> None:
    rig = Rig()
    rig.scheduler.tier = tier = WaitsForFiles()  # type: ignore[assignment]
    rig.scheduler.step()
    assert rig.inbox.waits == [GRAMMAR_POLL_S] and tier.turns == 1


def test_a_busy_scheduler_does_not_wait_and_beats_busy() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 3))
    rig.scheduler.step()
    rig.scheduler.step()
    assert rig.inbox.waits == [0.0]
    assert rig.progress.beats == [True, True]


def test_depth_one_decides_the_next_step_before_the_last_is_collected() -> None:
    rig = Rig(depth=1)
    rig.inbox.put(tokenized("a", PROMPT, 5))
    rig.scheduler.step()
    assert (len(rig.worker.plans), rig.outbox.frames) == (1, [])
    rig.scheduler.step()
    assert (len(rig.worker.plans), len(rig.outbox.frames)) == (2, 1)


def test_a_token_carries_the_version_of_the_weights_that_its_step_was_launched_on() -> None:
    rig = Rig(depth=1)
    rig.inbox.put(tokenized("a", PROMPT, 3))
    rig.scheduler.step()
    rig.worker.weight_version = "v2"
    rig.run()
    assert [m.weight_version for m in rig.tokens("a")] == ["default", "v2", "v2"]


def test_the_worker_forgets_requests_that_left() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 3))
    rig.run()
    assert rig.worker.forgotten == ["a"]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("where", ["launch", "collect"])
@pytest.mark.parametrize("position", [0, 9])
def test_only_the_request_that_breaks_a_step_fails(where: str, position: int, depth: int) -> None:
    rig = Rig(depth)
    rig.worker.raising["bad"] = (where, position)
    rig.inbox.put(*(tokenized(rid, [*PROMPT, i], 6) for i, rid in enumerate(("a", "bad", "b"))))
    rig.run()
    for i, rid in ((0, "a"), (2, "b")):
        ids = [token for message in rig.tokens(rid) for token in unpack_ids(message.ids)]
        assert ids == expected_output([*PROMPT, i], 6), rid
        assert rig.tokens(rid)[-1].finish == Finish(reason="length", length=6)
    *_, last = rig.tokens("bad")
    assert last.finish is not None and (last.finish.reason, last.finish.status) == ("error", 500)
    assert "ZeroDivisionError: bad" in last.finish.message
    assert not rig.scheduler.planner.audit()


def test_drafts_of_a_failed_step_are_verified_when_it_is_retried() -> None:
    loop = [2, 3, 4, 5, 6, 7, 8] * 2
    rig = Rig(model=looping_token, drafts=DraftOptions(8, 2, 8))
    rig.worker.raising["bad"] = ("launch", 34)  # in a step in which the other one verifies
    rig.inbox.put(tokenized("good", loop, 60), tokenized("bad", loop, 60, seed=1))
    rig.run()
    ids = [token for message in rig.tokens("good") for token in unpack_ids(message.ids)]
    assert ids == expected_output(loop, 60, 0, looping_token)
    again = [plan for plan in rig.worker.plans if len(plan.slices) == 1 and plan.slices[0].sequence.rid == "good"]
    assert again[0].verifications == 1
    assert all(plan.verifications == sum(bool(part.drafts) for part in plan.slices) for plan in rig.worker.plans)


def test_repeated_failures_without_a_success_end_the_server() -> None:
    rig = Rig()
    rig.worker.raising = {f"r{i}": ("launch", 0) for i in range(2 * MOST_FAILURES)}
    rig.inbox.put(*(tokenized(rid, PROMPT, 3) for rid in rig.worker.raising))
    with pytest.raises(ZeroDivisionError):
        rig.run()


def test_failures_with_successes_between_them_do_not_end_the_server() -> None:
    rig = Rig()
    for i in range(2 * MOST_FAILURES):
        rig.worker.raising[f"bad{i}"] = ("launch", 0)
        rig.inbox.put(tokenized(f"bad{i}", PROMPT, 2), tokenized(f"good{i}", PROMPT, 2))
        rig.run()
        assert len(rig.tokens(f"good{i}")) == 2


def test_a_failed_device_ends_the_server_at_once() -> None:
    rig = Rig()
    rig.worker.raising["a"] = ("collect", 0)

    def lost() -> None:
        raise OSError("device lost")

    rig.worker.reset = lost  # type: ignore[method-assign]
    rig.inbox.put(tokenized("a", PROMPT, 3))
    with pytest.raises(OSError, match="device lost"):
        rig.run()


def test_lost_pages_are_reported_when_idle_and_serving_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.scheduler.planner.pool.pages.free -= 3
    rig.inbox.put(tokenized("a", PROMPT, 2))
    with caplog.at_level(logging.ERROR):
        rig.run()
    assert "do not balance" in caplog.text
    rig.inbox.put(tokenized("b", PROMPT, 2))
    rig.run()
    assert len(rig.tokens("b")) == 2
    assert rig.scheduler.planner.audit() == ""


def test_idle_work_is_done_piece_by_piece_and_again_after_a_step() -> None:
    rig = Rig()
    rig.scheduler.idle_work, rig.scheduler.has_idle_work = iter([True, False, False]).__next__, True
    for _ in range(3):
        rig.scheduler.step()
    assert rig.inbox.waits == [0.0, 0.0, IDLE_BEAT_S]
    rig.inbox.put(tokenized("a", PROMPT, 1))
    rig.scheduler.step()
    assert rig.scheduler.has_idle_work
