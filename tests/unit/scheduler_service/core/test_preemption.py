"""Requests of higher priority take the place of running ones, under the priority policy."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stepper import Stepper, expected_output, tokenized

DEPTHS = pytest.mark.parametrize("depth", [0, 1])
LOW, HIGH = [10, 11, 12], [20, 21, 22, 23]


def stepper_of(depth: int = 0, **changes: Any) -> Stepper:
    return Stepper(depth, **{"policy": "priority", "preemption_threshold": 0, "max_running": 1, **changes})


def finished_order(stepper: Stepper) -> list[str]:
    """By when each left the batch for the last time."""
    return list(dict.fromkeys(reversed(stepper.worker.forgotten)))[::-1]


@DEPTHS
def test_a_higher_request_without_a_slot_takes_the_place_of_a_lesser_one_that_goes_on_later(depth: int) -> None:
    stepper = stepper_of(depth)
    stepper.add(tokenized("low", LOW, 20))
    for _ in range(5):
        stepper.step()
    stepper.add(tokenized("high", HIGH, 4, priority=1))
    while not stepper.updates.get("high"):
        stepper.step()
    assert "low" in stepper.planner.live
    stepper.run()
    assert finished_order(stepper) == ["high", "low"]
    assert stepper.output("low") == expected_output(LOW, 20)
    assert stepper.output("high") == expected_output(HIGH, 4)
    assert stepper.planner.stats.preemptions == 1
    assert stepper.planner.stats.retractions == 0  # those are for want of memory


@pytest.mark.parametrize(("threshold", "priority", "preempts"), [(10, 10, False), (10, 11, True), (0, 0, False)])
def test_the_difference_must_exceed_the_threshold(threshold: int, priority: int, preempts: bool) -> None:
    stepper = stepper_of(preemption_threshold=threshold)
    stepper.add(tokenized("low", LOW, 20))
    stepper.step()
    stepper.add(tokenized("high", HIGH, 4, priority=priority))
    stepper.run()
    assert finished_order(stepper) == (["high", "low"] if preempts else ["low", "high"])


def test_without_preemption_the_higher_request_waits() -> None:
    stepper = stepper_of(preemption_threshold=None)
    stepper.add(tokenized("low", LOW, 20))
    stepper.step()
    stepper.add(tokenized("high", HIGH, 4, priority=99))
    stepper.run()
    assert finished_order(stepper) == ["low", "high"]


def test_lower_values_come_first_where_the_server_says_so() -> None:
    stepper = stepper_of(low_values_first=True)
    stepper.add(tokenized("five", LOW, 20, priority=5))
    stepper.step()
    stepper.add(tokenized("one", HIGH, 4, priority=1))
    stepper.add(tokenized("nine", HIGH, 4, priority=9))
    stepper.run()
    assert finished_order(stepper) == ["one", "five", "nine"]


@DEPTHS
def test_as_few_as_needed_go_the_lowest_and_newest_first(depth: int) -> None:
    stepper = stepper_of(depth, max_running=4, total_pages=100)
    for rid, priority in [("a0", 0), ("b0", 0), ("c1", 1)]:
        stepper.add(tokenized(rid, range(ord(rid[0]) * 5, ord(rid[0]) * 5 + 20), 10, priority=priority))
        stepper.step()
    assert len(stepper.planner.running) == 3
    stepper.add(tokenized("high", range(800, 840), 4, priority=2))
    for _ in range(3):
        stepper.step()
    assert {s.rid for s in stepper.planner.running} == {"a0", "c1", "high"}
    assert stepper.planner.stats.preemptions == 1
    stepper.run()


def test_nothing_is_preempted_where_all_lower_priorities_together_would_not_make_room() -> None:
    stepper = stepper_of(max_running=4, total_pages=100)
    stepper.add(tokenized("equal", range(100, 170), 20, priority=5))
    stepper.add(tokenized("low", range(200, 205), 10))
    stepper.step()
    assert len(stepper.planner.running) == 2
    stepper.add(tokenized("high", range(300, 370), 4, priority=5))
    for _ in range(5):
        stepper.step()
    assert stepper.planner.stats.preemptions == 0
    assert {s.rid for s in stepper.planner.running} == {"equal", "low"}
    stepper.run()


def test_nothing_is_preempted_for_a_request_that_has_room() -> None:
    stepper = stepper_of(max_running=2)
    stepper.add(tokenized("low", LOW, 20))
    stepper.step()
    stepper.add(tokenized("high", HIGH, 4, priority=9))
    stepper.run()
    assert stepper.planner.stats.preemptions == 0


def test_nothing_is_preempted_for_a_request_that_awaits_a_prefix_being_computed() -> None:
    stem = list(range(100, 200))
    stepper = stepper_of(max_running=2, chunked_prefill_size=8, total_pages=140)
    stepper.add(tokenized("low", [*stem, 1], 2))
    stepper.step()
    stepper.add(tokenized("high", [*stem, 2], 2, priority=9))
    stepper.step()
    assert stepper.planner.stats.preemptions == 0
    stepper.run()
    assert stepper.output("high") == expected_output([*stem, 2], 2)


def test_a_request_in_flight_is_sent_back_once_and_its_token_is_kept() -> None:
    stepper = stepper_of(depth=1)
    stepper.add(tokenized("low", LOW, 20))
    for _ in range(3):
        stepper.step()
    assert stepper.in_flight
    stepper.add(tokenized("high", HIGH, 2, priority=1))
    for _ in range(3):
        stepper.step()
    assert stepper.planner.stats.preemptions == 1
    stepper.run()
    assert stepper.output("low") == expected_output(LOW, 20)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    depth=st.sampled_from([0, 1]),
    page_size=st.sampled_from([1, 4]),
    threshold=st.integers(0, 2),
    max_running=st.integers(1, 4),
)
def test_any_traffic_ends_with_the_right_tokens_and_few_preemptions(
    seed: int, depth: int, page_size: int, threshold: int, max_running: int
) -> None:
    """No two requests take each other's place in turns: a pair is at odds once, however long all of it lasts."""
    draw = random.Random(seed)
    stepper = stepper_of(
        depth,
        preemption_threshold=threshold,
        max_running=max_running,
        page_size=page_size,
        total_pages=96 // page_size,
        context_length=90,
        chunked_prefill_size=draw.choice([-1, 8]),
    )
    prompts, priorities = {}, {}
    for i in range(12):
        rid = f"r{i}"
        prompts[rid] = [draw.randrange(2, 900) for _ in range(draw.randrange(1, 40))]
        priorities[rid] = draw.randrange(5)
        stepper.add(tokenized(rid, prompts[rid], 1 + draw.randrange(30), priority=priorities[rid]))
        for _ in range(draw.randrange(6)):
            stepper.step()  # checks the page counts
    stepper.run(most_steps=2000)
    pairs = sum(low + threshold < high for low in priorities.values() for high in priorities.values())
    assert stepper.planner.stats.preemptions <= pairs
    for rid, prompt in prompts.items():
        output = stepper.output(rid)
        assert output == expected_output(prompt, len(output))


@DEPTHS
def test_the_highest_request_never_waits_while_lesser_ones_hold_what_it_needs(depth: int) -> None:
    stepper = stepper_of(depth, max_running=3, total_pages=100, chunked_prefill_size=16)
    for i in range(6):
        stepper.add(tokenized(f"low{i}", range(100 * i + 2, 100 * i + 30), 40))
    for turn in range(5):
        for _ in range(4):
            stepper.step()
        rid = f"high{turn}"
        stepper.add(tokenized(rid, range(700 + turn * 30, 725 + turn * 30), 3, priority=1))
        steps = stepper.steps
        while rid in stepper.planner.live:
            stepper.step()
        assert stepper.steps - steps <= 2 + 2 + 3 + depth * 3  # to leave, in two chunks, three tokens
    stepper.run()
