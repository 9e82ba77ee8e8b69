from array import array
from typing import Any

import pytest

from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Finish, LogprobOptions, unpack_ids
from quartet.scheduler_service.core.plan import NAN_HAPPENED
from tests.stepper import Stepper, expected_output, tokenized

PROMPT = [10, 11, 12, 13, 14]
DEPTHS = pytest.mark.parametrize("depth", [0, 1])


def shapes(stepper: Stepper) -> list[list[tuple[str, int, int]]]:
    """Every plan as (rid, start, end) rows."""
    return [[(part.sequence.rid, part.start, part.end) for part in plan.slices] for plan in stepper.worker.plans]


# running


@DEPTHS
def test_a_request_is_prefilled_then_decoded_and_leaves_no_page_or_slot_taken(depth: int) -> None:
    stepper = Stepper(depth)
    stepper.add(tokenized("a", PROMPT, 3))
    stepper.run()
    assert shapes(stepper) == [[("a", 0, 5)], [("a", 5, 6)], [("a", 6, 7)]]
    assert stepper.output("a") == expected_output(PROMPT, 3)
    assert stepper.finish("a") == Finish(reason="length", length=3)
    assert stepper.worker.forgotten == ["a"]


@DEPTHS
def test_decode_rows_come_first_and_share_the_budget_with_a_chunked_prompt(depth: int) -> None:
    stepper = Stepper(depth, chunked_prefill_size=8)
    stepper.add(tokenized("a", PROMPT, 20))
    stepper.step()
    stepper.add(tokenized("b", range(100, 120), 2))
    stepper.step()
    plan = stepper.worker.plans[-1]
    assert plan.decodes == 1
    assert [(part.sequence.rid, part.end - part.start, part.samples) for part in plan.slices] == [
        ("a", 1, True),
        ("b", 7, False),
    ]
    stepper.run()
    assert stepper.output("b") == expected_output(range(100, 120), 2)


def test_a_full_batch_of_decodes_leaves_a_quarter_of_the_budget_to_prefill() -> None:
    stepper = Stepper(chunked_prefill_size=8, max_running=12)
    for i in range(11):
        stepper.add(tokenized(f"r{i}", [20 + i], 50))
    for _ in range(5):
        stepper.step()
    stepper.add(tokenized("late", range(100, 140), 1))
    stepper.step()
    assert [part.end - part.start for part in stepper.worker.plans[-1].slices[11:]] == [2]


def test_whole_prompts_are_never_cut_and_stay_near_the_prefill_limit() -> None:
    stepper = Stepper(chunked_prefill_size=-1, max_prefill_tokens=10)
    for i in range(4):
        stepper.add(tokenized(f"r{i}", range(100 * i + 2, 100 * i + 9), 1))
    stepper.run()
    assert [[end for _, _, end in plan] for plan in shapes(stepper)] == [[7, 7], [7, 7]]


def test_no_more_requests_run_than_there_are_slots() -> None:
    stepper = Stepper(max_running=3)
    for i in range(10):
        stepper.add(tokenized(f"r{i}", [10 + i, 5], 4))
    stepper.run()
    assert max(len(plan.slices) for plan in stepper.worker.plans) == 3


# the end of a request


@DEPTHS
@pytest.mark.parametrize("named_by", ["model", "request"])
def test_a_stop_token_ends_the_request_even_on_its_last_allowed_token(depth: int, named_by: str) -> None:
    output = expected_output(PROMPT, 3)
    stepper = Stepper(depth, eos_ids=frozenset(output[2:] if named_by == "model" else []))
    stepper.add(tokenized("a", PROMPT, 3, stop_token_ids=output[2:] if named_by == "request" else None))
    stepper.run()
    assert stepper.output("a") == output
    assert stepper.finish("a") == Finish(reason="stop", matched=output[2])


@DEPTHS
def test_tokens_that_arrive_after_a_stop_are_dropped(depth: int) -> None:
    output = expected_output(PROMPT, 2)
    stepper = Stepper(depth, eos_ids=frozenset(output[1:]))
    stepper.add(tokenized("a", PROMPT, 10))
    stepper.run()
    assert stepper.output("a") == output
    assert len(stepper.worker.plans) == 2 + depth


def test_ignore_eos_disables_stop_tokens_too() -> None:
    output = expected_output(PROMPT, 5)
    stepper = Stepper(eos_ids=frozenset(output[:1]))
    stepper.add(tokenized("a", PROMPT, 5, ignore_eos=True, stop_token_ids=output[1:2]))
    stepper.run()
    assert stepper.output("a") == output


def test_no_new_tokens_means_prefill_only() -> None:
    stepper = Stepper()
    stepper.add(tokenized("a", PROMPT, 0))
    stepper.run()
    assert [part.samples for part in stepper.worker.plans[0].slices] == [False]
    assert (stepper.output("a"), stepper.finish("a")) == ([], Finish(reason="length", length=0))


def test_no_limit_means_until_the_context_is_full() -> None:
    stepper = Stepper(context_length=20)
    stepper.add(tokenized("a", PROMPT, None))
    stepper.run()
    assert len(stepper.output("a")) == 15
    assert stepper.finish("a") == Finish(reason="length", length=15)


def test_an_embedding_request_gives_its_vector_with_the_finish() -> None:
    stepper = Stepper(chunked_prefill_size=2)
    stepper.add(tokenized("a", PROMPT, task="embed"))
    stepper.run()
    (update,) = stepper.updates["a"]
    assert list(array("f", update.vector)) == [5.0] * 4
    assert update.finish == Finish(reason="length", length=0)


@DEPTHS
@pytest.mark.parametrize(
    ("error", "finish"),
    [
        (NAN_HAPPENED, Finish(reason="stop", matched=NAN_HAPPENED)),
        ("out of luck", Finish.internal("out of luck")),
    ],
)
def test_an_error_ends_only_its_own_request_whose_pages_are_not_cached(depth: int, error: str, finish: Finish) -> None:
    stepper = Stepper(depth)
    stepper.add(tokenized("bad", PROMPT, 5))
    stepper.add(tokenized("good", [50, 51], 5))
    stepper.worker.faults["bad"] = error
    stepper.run()
    assert stepper.finish("bad") == finish
    assert stepper.output("good") == expected_output([50, 51], 5)
    assert stepper.planner.pool.cached_prefix(next(iter(stepper.updates["bad"])).sequence) == 0


# abort


@DEPTHS
def test_abort_in_the_queue_says_so(depth: int) -> None:
    stepper = Stepper(depth, max_running=1)
    stepper.add(tokenized("a", PROMPT, 5))
    stepper.step()
    stepper.add(tokenized("b", PROMPT, 5))
    stepper.abort("b")
    assert stepper.finish("b") == Finish(reason="abort", message="Abort before prefill")
    stepper.run()
    assert len(stepper.output("a")) == 5


@DEPTHS
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_abort_mid_prefill_or_decoding_ends_once_and_keeps_what_was_sent(depth: int, steps: int) -> None:
    stepper = Stepper(depth, chunked_prefill_size=2)
    stepper.add(tokenized("a", PROMPT, 20))
    for _ in range(steps):
        stepper.step()
    stepper.abort("a")
    stepper.abort("a")
    assert stepper.finish("a") == Finish(reason="abort", message="Aborted")
    stepper.run()
    assert stepper.output("a") == expected_output(PROMPT, len(stepper.output("a")))
    assert len(stepper.output("a")) <= max(0, steps - 2)


def test_abort_in_flight_frees_pages_once_and_only_when_the_step_is_back() -> None:
    stepper = Stepper(depth=1)
    stepper.add(tokenized("a", PROMPT, 20))
    stepper.step()
    held = stepper.planner.pool.used
    stepper.abort("a")
    assert stepper.planner.pool.used == held and not stepper.planner.idle
    stepper.run()
    assert stepper.planner.pool.used == 0
    assert stepper.worker.forgotten == ["a"]


def test_a_message_given_with_an_abort_is_handed_on() -> None:
    stepper = Stepper()
    stepper.add(tokenized("a", PROMPT, 20))
    stepper.abort("a", "server drains")
    assert stepper.finish("a") == Finish(reason="abort", message="server drains")


def test_an_abort_of_an_unknown_rid_does_nothing() -> None:
    stepper = Stepper()
    stepper.abort("nobody")
    assert stepper.updates == {}


def test_a_rid_can_be_used_again_while_its_predecessor_is_still_in_flight() -> None:
    stepper = Stepper(depth=1)
    stepper.add(tokenized("a", PROMPT, 20))
    stepper.step()
    stepper.abort("a")
    first = stepper.updates.pop("a")
    stepper.add(tokenized("a", [70, 71], 3))
    stepper.run()
    assert first[-1].finish == Finish(reason="abort", message="Aborted")
    assert stepper.output("a") == expected_output([70, 71], 3)


# the prefix tree


@DEPTHS
def test_a_second_request_finds_the_first_ones_prefix_and_computes_one_token_at_least(depth: int) -> None:
    stepper = Stepper(depth)
    stepper.add(tokenized("a", PROMPT, 2))
    stepper.run()
    stepper.add(tokenized("b", PROMPT, 2))
    stepper.run()
    assert stepper.updates["b"][-1].sequence.cached_tokens == 4
    assert stepper.output("b") == stepper.output("a")


def test_a_conversation_finds_prompt_and_answer_of_its_last_turn() -> None:
    stepper = Stepper()
    stepper.add(tokenized("a", PROMPT, 6))
    stepper.run()
    turn = [*PROMPT, *stepper.output("a"), 900]
    stepper.add(tokenized("b", turn, 2))
    stepper.run()
    assert stepper.updates["b"][-1].sequence.cached_tokens == 10  # the last answer token was never an input
    assert stepper.output("b") == expected_output(turn, 2)


@DEPTHS
def test_requests_that_arrive_together_compute_their_long_shared_prefix_once(depth: int) -> None:
    stepper = Stepper(depth, page_size=4, total_pages=250, chunked_prefill_size=64)
    shared = list(range(100, 220))
    for i in range(6):
        stepper.add(tokenized(f"r{i}", [*shared, 300 + i, 400], 2))
    stepper.run()
    computed = sum(part.end - part.start for plan in stepper.worker.plans for part in plan.slices[plan.decodes :])
    assert computed == 120 + 6 * 2
    for i in range(6):
        assert stepper.output(f"r{i}") == expected_output([*shared, 300 + i, 400], 2)


def test_a_request_that_waits_for_a_prefix_goes_on_when_the_one_that_computes_it_is_aborted() -> None:
    stepper = Stepper(depth=1, chunked_prefill_size=32)
    shared = list(range(100, 260))
    stepper.add(tokenized("a", [*shared, 1], 2))
    stepper.add(tokenized("b", [*shared, 2], 2))
    stepper.step()
    stepper.abort("a")
    stepper.run()
    assert stepper.output("b") == expected_output([*shared, 2], 2)


def test_namespaces_keep_prefixes_apart() -> None:
    stepper = Stepper()
    for rid, key in (("a", ""), ("b", "tenant"), ("c", "tenant")):
        stepper.add(tokenized(rid, PROMPT, 1, extra_key=key))
        stepper.run()
    cached = [stepper.updates[rid][-1].sequence.cached_tokens for rid in "abc"]
    assert cached == [0, 0, 4]


def test_forgotten_prefixes_are_never_matched_even_those_of_requests_that_ran_on() -> None:
    stepper = Stepper()
    stepper.add(tokenized("a", PROMPT, 8))
    stepper.step()
    stepper.planner.forget_prefixes()
    stepper.run()
    stepper.add(tokenized("b", PROMPT, 1))
    stepper.run()
    assert stepper.updates["b"][-1].sequence.cached_tokens == 0


@pytest.mark.parametrize("changes", [{"reuse_prefixes": False}, {}])
def test_float_prompts_and_a_disabled_tree_reuse_nothing(changes: dict[str, Any]) -> None:
    stepper = Stepper(**changes)
    for rid in "ab":
        stepper.add(tokenized(rid, PROMPT, 2, embeds=b"" if changes else bytes(4)))
        stepper.run()
    assert stepper.updates["b"][-1].sequence.cached_tokens == 0
    assert stepper.planner.pool.tree.cached == 0


# prompt logprobs


@DEPTHS
@pytest.mark.parametrize("start", [0, 2, 4])
def test_prompt_logprobs_come_once_complete_and_with_a_leading_null(depth: int, start: int) -> None:
    stepper = Stepper(depth, chunked_prefill_size=2)
    stepper.add(tokenized("warm", PROMPT, 1))
    stepper.run()
    stepper.add(tokenized("a", PROMPT, 3, logprobs=LogprobOptions(start=start)))
    stepper.run()
    first, *rest = stepper.updates["a"]
    assert first.input_logprobs is not None and all(update.input_logprobs is None for update in rest)
    assert list(unpack_ids(first.input_logprobs.ids)) == PROMPT[start:]
    values = array("f", first.input_logprobs.values)
    assert values[0] != values[0] and list(values[1:]) == [-0.5 - token % 7 for token in PROMPT[start + 1 :]]
    assert first.sequence.cached_tokens <= start
    assert all(update.logprobs is not None for update in stepper.updates["a"])


def test_a_logprob_start_at_the_prompts_end_gives_an_empty_list() -> None:
    stepper = Stepper()
    stepper.add(tokenized("a", PROMPT, 1, logprobs=LogprobOptions(start=5)))
    stepper.run()
    logprobs = stepper.updates["a"][0].input_logprobs
    assert logprobs is not None and logprobs.ids == b""


def test_no_prompt_logprobs_are_sent_when_they_were_not_asked_or_not_finished() -> None:
    stepper = Stepper(chunked_prefill_size=2)
    stepper.add(tokenized("a", PROMPT, 1, logprobs=LogprobOptions()))
    stepper.add(tokenized("b", PROMPT, 1, logprobs=LogprobOptions(start=0)))
    stepper.step()
    stepper.abort("b")
    stepper.run()
    assert stepper.updates["a"][0].input_logprobs is None
    assert stepper.updates["b"][0].input_logprobs is None


# retraction


@DEPTHS
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_retraction_changes_no_token(depth: int, page_size: int) -> None:
    stepper = Stepper(depth, page_size=page_size, total_pages=160 // page_size, chunked_prefill_size=16)
    prompts = {f"r{i}": [30 + i, *range(50, 50 + 3 * i)] for i in range(6)}
    stepper.planner.growth.ratio = stepper.planner.growth.START = 0.0
    for seed, (rid, prompt) in enumerate(prompts.items()):
        stepper.add(tokenized(rid, prompt, 60, seed=seed))
    stepper.run()
    assert stepper.planner.stats.retractions > 0
    for seed, (rid, prompt) in enumerate(prompts.items()):
        assert stepper.output(rid) == expected_output(prompt, 60, seed)
        assert stepper.finish(rid) == Finish(reason="length", length=60)


def test_the_newest_request_is_retracted_first_and_its_retractions_are_counted() -> None:
    stepper = Stepper(total_pages=30)
    stepper.planner.growth.ratio = 0.0
    stepper.add(tokenized("old", [10, 11], 20))
    stepper.add(tokenized("new", [20, 21], 20))
    stepper.run()
    assert stepper.updates["old"][-1].sequence.retractions == 0
    assert stepper.updates["new"][-1].sequence.retractions == 1


def test_prompt_logprobs_survive_a_retraction_without_being_scored_twice() -> None:
    stepper = Stepper(total_pages=48, chunked_prefill_size=4)
    stepper.planner.growth.ratio = 0.0
    stepper.add(tokenized("old", [10, 11], 40))
    for _ in range(20):
        stepper.step()
    prompt = list(range(100, 124))
    stepper.add(tokenized("new", prompt, 4, logprobs=LogprobOptions(start=0)))
    stepper.run()
    first = stepper.updates["new"][0]
    assert first.sequence.retractions > 0
    assert first.input_logprobs is not None and list(unpack_ids(first.input_logprobs.ids)) == prompt
    scored = [part.score_from for plan in stepper.worker.plans for part in plan.slices if part.score_from >= 0]
    assert scored == sorted(set(scored))


def test_the_only_request_in_a_full_pool_can_always_go_on() -> None:
    stepper = Stepper(total_pages=20)
    stepper.add(tokenized("a", PROMPT, None))
    stepper.run()
    assert len(stepper.output("a")) == 15


# replay


@DEPTHS
@pytest.mark.parametrize("delivered", [1, 4])
def test_a_replayed_request_goes_on_after_what_was_delivered(depth: int, delivered: int) -> None:
    output = expected_output(PROMPT, 6)
    stepper = Stepper(depth)
    stepper.add(tokenized("a", PROMPT, 6, attempt=1, resume=output[:delivered]))
    stepper.run()
    assert stepper.output("a") == output[delivered:]
    assert stepper.finish("a") == Finish(reason="length", length=6)


def test_a_replayed_request_that_was_complete_ends_without_a_step() -> None:
    output = expected_output(PROMPT, 3)
    stepper = Stepper(eos_ids=frozenset(output[2:]))
    stepper.add(tokenized("a", PROMPT, 10, resume=output))
    assert stepper.finish("a") == Finish(reason="stop", matched=output[2])
    assert stepper.planner.idle and stepper.worker.plans == []


def test_a_newer_attempt_takes_the_place_of_an_older_one() -> None:
    stepper = Stepper(depth=1)
    stepper.add(tokenized("a", PROMPT, 10))
    stepper.step()
    old = stepper.planner.add(tokenized("a", PROMPT, 2, attempt=1), 0.0)
    assert [(update.sequence.request.attempt, update.finish is not None) for update in old] == [(0, True)]
    stepper.updates.clear()
    stepper.run()
    assert stepper.output("a") == expected_output(PROMPT, 2)


def test_a_full_queue_takes_back_whom_it_had_admitted() -> None:
    stepper = Stepper(max_running=1, max_queued=1)
    for rid in "ab":
        stepper.add(tokenized(rid, PROMPT, 3))
    with pytest.raises(RequestError, match="queue is full"):
        stepper.add(tokenized("c", PROMPT, 3))
    for rid in "de":  # they had their place with the scheduler before
        message = tokenized(rid, PROMPT, 3, attempt=1)
        message.request.again = True
        stepper.add(message)
    stepper.run()
    assert [stepper.output(rid) for rid in "abde"] == [expected_output(PROMPT, 3)] * 4
    stepper.planner.check_invariants()


def test_a_duplicate_of_a_living_request_is_ignored() -> None:
    stepper = Stepper()
    stepper.add(tokenized("a", PROMPT, 3))
    stepper.add(tokenized("a", [77], 3))
    stepper.run()
    assert stepper.output("a") == expected_output(PROMPT, 3)


# order and limits


def admitted(stepper: Stepper) -> list[str]:
    order: list[str] = []
    for plan in stepper.worker.plans:
        order += [part.sequence.rid for part in plan.slices if part.sequence.rid not in order]
    return order


def test_requests_are_served_in_order_of_arrival_by_default() -> None:
    stepper = Stepper(max_running=1)
    for rid in "abc":
        stepper.add(tokenized(rid, [ord(rid)], 2))
    stepper.run()
    assert admitted(stepper) == ["a", "b", "c"]


def test_lpm_serves_the_longest_cached_prefix_first() -> None:
    stepper = Stepper(max_running=1, policy="lpm")
    stepper.add(tokenized("warm", [*PROMPT, 20, 21], 2))
    stepper.run()
    for rid, prompt in (("none", [90, 91]), ("some", [*PROMPT, 95]), ("most", [*PROMPT, 20, 21, 95])):
        stepper.add(tokenized(rid, prompt, 2))
    stepper.run()
    assert admitted(stepper) == ["warm", "most", "some", "none"]


def test_priority_goes_before_arrival() -> None:
    stepper = Stepper(max_running=1, policy="priority")
    for rid, priority in (("low", 0), ("high", 5), ("middle", 3)):
        stepper.add(tokenized(rid, [ord(rid[0])], 2, priority=priority))
    stepper.run()
    assert admitted(stepper) == ["high", "middle", "low"]


def test_a_full_queue_refuses_the_next_request() -> None:
    stepper = Stepper(max_running=1, max_queued=1)
    stepper.add(tokenized("a", [10], 5))
    stepper.add(tokenized("b", [11], 5))
    with pytest.raises(RequestError) as caught:
        stepper.add(tokenized("c", [12], 5))
    assert (caught.value.message, caught.value.kind) == ("The request queue is full.", Kind.UNAVAILABLE)
    stepper.run()
    assert set(stepper.updates) == {"a", "b"}


def test_a_full_queue_drops_none_that_comes_again_after_a_death() -> None:
    stepper = Stepper(max_running=1, max_queued=1, policy="priority")
    stepper.add(tokenized("a", [10], 5))
    stepper.step()
    comes_again = tokenized("b", [11], 5, attempt=1)
    comes_again.request.again = True
    stepper.add(comes_again)
    with pytest.raises(RequestError, match="full"):
        stepper.add(tokenized("c", [12], 5, priority=9))
    stepper.run()
    assert stepper.finish("b").reason == "length"


def test_a_full_queue_drops_a_lesser_request_under_the_priority_policy() -> None:
    stepper = Stepper(max_running=1, max_queued=1, policy="priority")
    stepper.add(tokenized("a", [10], 5))
    stepper.step()
    stepper.add(tokenized("b", [11], 5, priority=1))
    stepper.add(tokenized("c", [12], 5, priority=2))
    finish = stepper.finish("b")
    assert finish is not None and (finish.reason, finish.status) == ("error", 503)
    stepper.run()
    assert len(stepper.output("c")) == 5


def test_a_paused_planner_plans_nothing_and_goes_on_afterwards() -> None:
    stepper = Stepper(depth=1)
    stepper.add(tokenized("a", PROMPT, 5))
    stepper.step()
    stepper.planner.paused = True
    assert stepper.step() is None and not stepper.planner.busy and not stepper.in_flight
    stepper.planner.paused = False
    stepper.run()
    assert stepper.output("a") == expected_output(PROMPT, 5)


def test_hidden_states_of_every_position_are_sent_once() -> None:
    stepper = Stepper(chunked_prefill_size=2)
    stepper.add(tokenized("warm", PROMPT, 1))
    stepper.run()
    stepper.add(tokenized("a", PROMPT, 3, hidden=True))
    stepper.run()
    sizes = [len(update.hidden_states) for update in stepper.updates["a"]]
    assert sizes == [5, 1, 1]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("routed_from", [0, 3])
def test_chosen_experts_of_all_positions_but_the_last_come_with_the_end(depth: int, routed_from: int) -> None:
    stepper = Stepper(depth=depth, chunked_prefill_size=2)
    stepper.add(tokenized("warm", PROMPT, 1))
    stepper.run()
    stepper.add(tokenized("a", PROMPT, 4, routed_from=routed_from))
    stepper.run()
    updates = stepper.updates["a"]
    assert unpack_ids(updates[-1].routed_experts).tolist() == list(range(routed_from, len(PROMPT) + 4 - 1))
    assert not any(update.routed_experts for update in updates[:-1])


@pytest.mark.parametrize(("steps", "computed"), [(0, 0), (1, 2), (3, 5), (5, 7)])
def test_an_aborted_request_brings_the_experts_of_what_was_computed(steps: int, computed: int) -> None:
    stepper = Stepper(chunked_prefill_size=2)
    stepper.add(tokenized("a", PROMPT, 50, routed_from=0))
    for _ in range(steps):
        stepper.step()
    stepper.abort("a")
    [last] = [update for update in stepper.updates["a"] if update.finish]
    assert unpack_ids(last.routed_experts).tolist() == list(range(computed))


def test_page_counts_that_do_not_add_up_are_found_and_repaired() -> None:
    stepper = Stepper()
    stepper.add(tokenized("a", PROMPT, 2))
    stepper.run()
    stepper.planner.pool.pages.free -= 1
    assert "free" in stepper.planner.audit()
    stepper.planner.repair()
    assert stepper.planner.audit() == ""
    stepper.add(tokenized("b", PROMPT, 2))
    stepper.run()
