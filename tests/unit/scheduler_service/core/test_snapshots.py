"""Models with recurrent layers: cached prefixes end where there is a snapshot of the state, and no snapshot is lost."""

import random
from typing import Any

import pytest

from quartet.runtime.errors import RequestError
from quartet.scheduler_service.core.plan import NAN_HAPPENED
from quartet.scheduler_service.core.snapshots import SnapshotOptions, Snapshots, borders
from tests.stepper import Stepper, expected_output, tokenized

PAGE = 4


class Node:
    snapshot = -1


def stepper(count: int = 8, interval: int = 32, **changes: Any) -> Stepper:
    options = SnapshotOptions(count, interval)
    return Stepper(snapshots=options, **({"page_size": PAGE, "total_pages": 250} | changes))


def run(server: Stepper, rid: str, prompt: list[int], tokens: int = 4) -> int:
    """Serve one request, whose output must be right; returns how much of its prompt was cached."""
    server.add(tokenized(rid, prompt, tokens))
    server.run()
    assert server.output(rid) == expected_output(prompt, tokens)
    return server.updates[rid][0].sequence.cached_tokens


def test_borders_are_those_wanted_first_then_multiples_of_the_interval_from_the_end() -> None:
    assert borders(10, 100, [96, 40, 8, 104, 96], 32) == [96, 40, 64, 32]
    assert borders(32, 64, [], 32) == [64]
    assert borders(0, 3, [0], 4) == []


def test_same_prompt_is_cached_up_to_the_last_page_border_before_its_end() -> None:
    server = stepper()
    prompt = list(range(2, 25))
    assert run(server, "a", prompt) == 0
    assert run(server, "b", prompt) == 20
    assert run(server, "c", [*prompt, 99, 98, 97]) == 20


def test_a_branch_is_computed_once_and_found_by_the_next_that_takes_it() -> None:
    server = stepper(interval=1000)
    stem = list(range(2, 50))
    assert run(server, "a", [*stem, *[100] * 20]) == 0
    assert run(server, "b", [*stem, *[200] * 20]) == 0  # the tree has the stem, and no state behind it
    assert run(server, "c", [*stem, *[300] * 20]) == len(stem)


def test_long_prompts_and_outputs_are_found_at_regular_distances() -> None:
    server = stepper(interval=32)
    prompt = list(range(2, 72))
    assert run(server, "a", prompt, tokens=40) == 0
    output = server.output("a")
    assert run(server, "b", [*prompt[:66], 500]) == 64
    assert run(server, "c", [*prompt, *output, 500]) == 96


def test_without_snapshots_nothing_is_found_and_answers_stay_right() -> None:
    server = stepper(count=0)
    prompt = list(range(2, 25))
    assert [run(server, rid, prompt) for rid in "abc"] == [0, 0, 0]


def test_least_recently_used_snapshot_gives_way() -> None:
    server = stepper(count=2, interval=1000)
    first, second, third = ([seed] * 24 for seed in (3, 4, 5))
    run(server, "1", first)
    run(server, "2", second)
    assert run(server, "3", first) == 20
    run(server, "4", third)
    assert run(server, "5", first) == 20
    assert run(server, "6", second) == 0


def test_a_snapshot_that_a_launched_slice_reads_is_not_given_to_another() -> None:
    snapshots, node = Snapshots(1), Node()
    number = snapshots.take()
    assert number is not None and snapshots.take() is None
    snapshots.attach(number, node)
    snapshots.begin_reading(number)
    assert snapshots.take() is None
    snapshots.end_reading(number)
    assert snapshots.take() == number
    assert node.snapshot == -1


def test_snapshots_of_evicted_pages_are_free_again() -> None:
    server = stepper(count=4, interval=1000, total_pages=12)
    for seed in range(3, 12):
        run(server, f"r{seed}", [seed] * 30)
    assert server.planner.pool.snapshots.held <= 2
    server.planner.forget_prefixes()
    assert server.planner.pool.snapshots.held == 0
    assert server.planner.audit() == ""


def test_a_failed_step_gives_its_snapshots_back() -> None:
    server = stepper()
    server.add(tokenized("a", range(2, 30)))
    server.worker.faults["a"] = NAN_HAPPENED
    server.run()
    assert server.planner.pool.snapshots.held == 0
    assert server.planner.audit() == ""


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("page_size", [1, 16])
def test_ten_thousand_random_operations_lose_no_snapshot(page_size: int, depth: int) -> None:
    """Every operation checks all invariants, and the fake worker the state that each slice begins with."""
    draw = random.Random(page_size + depth)
    server = stepper(
        7, 32, page_size=page_size, total_pages=320 // page_size, depth=depth, max_running=6, chunked_prefill_size=24
    )
    stems = [[seed] * 20 + [seed + 1] * 60 for seed in (3, 3, 7)] + [list(range(100, 180))]
    prompts: dict[str, list[int]] = {}
    for turn in range(2500):  # four parametrizations
        match draw.randrange(12):
            case 0 | 1 | 2:
                prompt = [*draw.choice(stems)[: draw.randrange(1, 80)], *[draw.randrange(2, 999)] * draw.randrange(9)]
                try:
                    server.add(tokenized(f"r{turn}", prompt, draw.randrange(60)))
                except RequestError:
                    continue
                prompts[f"r{turn}"] = prompt
            case 3 if server.planner.live:
                server.abort(draw.choice(list(server.planner.live)))
            case 4 if server.planner.live:
                server.worker.faults[draw.choice(list(server.planner.live))] = NAN_HAPPENED
            case 5 if draw.random() < 0.1:
                server.planner.forget_prefixes(free=draw.random() < 0.5)
            case 6 if draw.random() < 0.2:
                server.planner.retract_all()
            case _:
                server.step()
        server.planner.check_invariants()
    server.run()
    assert server.planner.stats.cached_tokens > 0
    assert server.planner.stats.retractions > 0
    for rid, prompt in prompts.items():
        finish = server.finish(rid)
        assert finish is not None
        if finish.reason == "length":
            assert server.output(rid) == expected_output(prompt, len(server.output(rid)))
