"""Requests that wait or run for too long."""

from typing import Any

import pytest

from quartet.runtime.control import ContinueGeneration
from quartet.runtime.errors import Kind
from quartet.runtime.messages import Finish
from quartet.scheduler_service.core.deadlines import RAN, WAITED
from tests.rig import PROMPT, Rig
from tests.stepper import Stepper, expected_output, tokenized


def stepped(stepper: Stepper, until: float, paused: bool = False) -> None:
    """Turns of the loop, a second each."""
    while stepper.steps < until:
        stepper.take(stepper.planner.expire(float(stepper.steps)))
        stepper.forget()
        if paused:
            stepper.steps += 1
        else:
            stepper.step()
        stepper.planner.check_invariants()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_that_waits_too_long_ends_with_a_503(depth: int) -> None:
    stepper = Stepper(depth, max_running=1, waiting_timeout_s=10)
    stepper.add(tokenized("runs", PROMPT, 40))
    stepper.add(tokenized("waits", PROMPT, 40))
    stepped(stepper, 10)
    assert "waits" in stepper.planner.live
    stepped(stepper, 14)
    finish = stepper.finish("waits")
    assert finish and (finish.reason, finish.status, finish.message) == ("error", Kind.UNAVAILABLE.status, WAITED)
    assert "runs" in stepper.planner.live  # this limit is for waiting requests only
    stepper.run()
    assert stepper.output("runs") == expected_output(PROMPT, 40)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_that_runs_too_long_ends_with_a_503_and_gives_all_back(depth: int) -> None:
    stepper = Stepper(depth, running_timeout_s=10)
    stepper.add(tokenized("a", PROMPT, 100))
    stepped(stepper, 16)
    finish = stepper.finish("a")
    assert finish and (finish.reason, finish.status, finish.message) == ("error", Kind.UNAVAILABLE.status, RAN)
    assert len(stepper.output("a")) >= 8
    stepper.run()


def test_time_in_the_queue_after_a_retraction_counts_as_running() -> None:
    stepper = Stepper(max_running=1, waiting_timeout_s=5, running_timeout_s=30)
    stepper.add(tokenized("a", PROMPT, 100))
    stepped(stepper, 3)
    stepper.planner.retract_all()
    stepper.planner.order = lambda waiting, memory: []  # admits nobody
    stepped(stepper, 20)
    assert "a" in stepper.planner.live  # the limit on waiting is for those that never ran
    stepped(stepper, 40)
    finish = stepper.finish("a")
    assert finish and finish.message == RAN


@pytest.mark.parametrize("state", ["paused", "asleep"])
def test_time_in_which_the_server_is_paused_or_asleep_does_not_count(state: str) -> None:
    stepper = Stepper(max_running=1, waiting_timeout_s=10, running_timeout_s=10)
    stepper.add(tokenized("runs", PROMPT, 100))
    stepper.add(tokenized("waits", PROMPT, 40))
    stepped(stepper, 4)
    setattr(stepper.planner, state, True)
    stepped(stepper, 1000, paused=True)
    setattr(stepper.planner, state, False)
    stepped(stepper, 1003)
    assert stepper.planner.live.keys() == {"runs", "waits"}
    stepped(stepper, 1020)
    assert not stepper.planner.live


@pytest.mark.parametrize("limits", [{}, {"waiting_timeout_s": None, "running_timeout_s": None}])
def test_without_limits_no_request_expires(limits: dict[str, Any]) -> None:
    stepper = Stepper(max_running=1, context_length=3000, total_pages=3000, **limits)
    stepper.add(tokenized("runs", PROMPT, 2500))
    stepper.add(tokenized("waits", PROMPT, 4))
    stepped(stepper, 2000)
    assert stepper.planner.live.keys() == {"runs", "waits"}


def test_the_loop_sends_the_end_of_an_expired_request() -> None:
    rig = Rig(max_running=1, waiting_timeout_s=3)
    rig.inbox.put(tokenized("runs", PROMPT, 50), tokenized("waits", PROMPT, 4))
    rig.scheduler.step()
    rig.time = 10.0
    rig.scheduler.step()
    (sent,) = rig.tokens("waits")
    assert sent.finish is not None and (sent.finish.status, sent.finish.message) == (503, WAITED)
    assert sent.request is not None  # its first message, so that the detokenizer knows it


@pytest.mark.parametrize("limit", ["waiting_timeout_s", "running_timeout_s"])
def test_time_before_a_request_arrived_does_not_count(limit: str) -> None:
    rig = Rig(max_running=1, **{limit: 0.5})
    rig.scheduler.step()
    rig.time = 1.0  # an idle loop has waited for it
    rig.inbox.put(tokenized("a", PROMPT, 1))
    rig.scheduler.step()
    assert [sent.finish and sent.finish.reason for sent in rig.tokens("a")] == ["length"]


def test_a_pause_that_ends_with_a_message_does_not_count() -> None:
    rig = Rig(max_running=1, running_timeout_s=5)
    rig.inbox.put(tokenized("a", PROMPT, 4))
    rig.scheduler.step()
    rig.scheduler.planner.paused = True
    rig.scheduler.step()
    rig.time = 100.0
    rig.inbox.put(ContinueGeneration(id="on"))
    rig.run()
    assert rig.tokens("a")[-1].finish == Finish(reason="length", length=4)
