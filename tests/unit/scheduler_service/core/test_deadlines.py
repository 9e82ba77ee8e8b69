"""Requests that wait or run for too long."""

from typing import Any

import pytest

from quartet.runtime.control import ContinueGeneration
from quartet.runtime.errors import Kind
from quartet.runtime.messages import Finish
from quartet.scheduler_service.core.deadlines import RAN, WAITED
from tests.rig import PROMPT, Rig
from tests.stepper import Stepper, expected_output, tokenized


def stepped(stepper: Stepper, until: float, resting: bool = False) -> None:
    """Turns of the loop, a second each."""
    while stepper.steps < until:
        stepper.take(stepper.planner.expire(float(stepper.steps)))
        stepper.forget()
        if resting:
            stepper.steps += 1
        else:
            stepper.step()
        stepper.planner.check()


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
    assert "runs" in stepper.planner.live  # what runs is none of this limit's business
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


def test_time_sent_back_to_the_queue_counts_as_running() -> None:
    stepper = Stepper(max_running=1, waiting_timeout_s=5, running_timeout_s=30)
    stepper.add(tokenized("a", PROMPT, 100))
    stepped(stepper, 3)
    stepper.planner.retract_all()
    stepper.planner.order = lambda waiting, memory: []  # nobody is let in again
    stepped(stepper, 20)
    assert "a" in stepper.planner.live  # the limit on waiting is for those that never ran
    stepped(stepper, 40)
    finish = stepper.finish("a")
    assert finish and finish.message == RAN


@pytest.mark.parametrize("rest", ["paused", "asleep"])
def test_a_rest_of_the_server_counts_against_nobody(rest: str) -> None:
    stepper = Stepper(max_running=1, waiting_timeout_s=10, running_timeout_s=10)
    stepper.add(tokenized("runs", PROMPT, 100))
    stepper.add(tokenized("waits", PROMPT, 40))
    stepped(stepper, 4)
    setattr(stepper.planner, rest, True)
    stepped(stepper, 1000, resting=True)
    setattr(stepper.planner, rest, False)
    stepped(stepper, 1003)
    assert stepper.planner.live.keys() == {"runs", "waits"}
    stepped(stepper, 1020)
    assert not stepper.planner.live


@pytest.mark.parametrize("limits", [{}, {"waiting_timeout_s": None, "running_timeout_s": None}])
def test_without_limits_nobody_is_late(limits: dict[str, Any]) -> None:
    stepper = Stepper(max_running=1, context_length=3000, total_pages=3000, **limits)
    stepper.add(tokenized("runs", PROMPT, 2500))
    stepper.add(tokenized("waits", PROMPT, 4))
    stepped(stepper, 2000)
    assert stepper.planner.live.keys() == {"runs", "waits"}


def test_the_loop_tells_the_client() -> None:
    rig = Rig(max_running=1, waiting_timeout_s=3)
    rig.inbox.put(tokenized("runs", PROMPT, 50), tokenized("waits", PROMPT, 4))
    rig.scheduler.step()
    rig.time = 10.0
    rig.scheduler.step()
    (told,) = rig.tokens("waits")
    assert told.finish is not None and (told.finish.status, told.finish.message) == (503, WAITED)
    assert told.request is not None  # its first word, so that the detokenizer knows it


@pytest.mark.parametrize("limit", ["waiting_timeout_s", "running_timeout_s"])
def test_time_before_a_request_came_is_not_counted_against_it(limit: str) -> None:
    rig = Rig(max_running=1, **{limit: 0.5})
    rig.scheduler.step()
    rig.time = 1.0  # an idle loop has waited for it
    rig.inbox.put(tokenized("a", PROMPT, 1))
    rig.scheduler.step()
    assert [told.finish and told.finish.reason for told in rig.tokens("a")] == ["length"]


def test_a_pause_that_ends_with_a_message_counts_against_nobody() -> None:
    rig = Rig(max_running=1, running_timeout_s=5)
    rig.inbox.put(tokenized("a", PROMPT, 4))
    rig.scheduler.step()
    rig.scheduler.planner.paused = True
    rig.scheduler.step()
    rig.time = 100.0
    rig.inbox.put(ContinueGeneration(id="on"))
    rig.run()
    assert rig.tokens("a")[-1].finish == Finish(reason="length", length=4)
