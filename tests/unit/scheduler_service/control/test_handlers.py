import logging
from typing import Any

import msgspec
import pytest

from quartet.runtime.control import (
    COMMAND_LOST,
    COMMANDS,
    Abort,
    ContinueGeneration,
    Detokenize,
    FlushCache,
    PauseGeneration,
    Probe,
    SlowDown,
    Tokenize,
)
from quartet.runtime.messages import Facts, Reply, Restarted, Tokens
from quartet.scheduler_service.control.handlers import (
    FLUSH_FAILED,
    FLUSH_IN_PROGRESS,
    FLUSH_TIMED_OUT,
    FLUSHED,
    HANDLERS,
    selected_rids,
)
from quartet.scheduler_service.scheduler import COMMAND_POLL_S
from tests.rig import PROMPT, Rig
from tests.stepper import VOCABULARY, tokenized

ELSEWHERE = {Tokenize, Detokenize}  # answered by the text services


def replies(rig: Rig) -> list[Reply]:
    return [m for m in rig.outbox.messages if isinstance(m, Reply)]


def finishes(rig: Rig, *rids: str) -> list[str | None]:
    lasts = [rig.tokens(rid)[-1].finish for rid in rids]
    return [last.reason if last else None for last in lasts]


def test_every_command_has_a_handler_or_is_answered_elsewhere() -> None:
    assert set(COMMANDS) == set(HANDLERS) | ELSEWHERE


# abort


LIVE = ["a", "ab", "a_0", "a_1", "a_x", "b"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (Abort(rid="a"), ["a", "a_0", "a_1"]),
        (Abort(rid="a", exact=True), ["a"]),
        (Abort(rid="a", prefix=True), ["a", "ab", "a_0", "a_1", "a_x"]),
        (Abort(abort_all=True), LIVE),
        (Abort(), []),
        (Abort(rid="z"), []),
        (Abort(rid="a_0"), ["a_0"]),
    ],
)
def test_an_abort_selects_rids(command: Abort, expected: list[str]) -> None:
    assert selected_rids(command, LIVE) == expected


def test_a_stop_found_in_an_earlier_attempt_does_not_end_a_later_one() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("later", PROMPT, 5, attempt=2), tokenized("same", PROMPT, 5, attempt=1))
    rig.inbox.put(*(Abort(rid=rid, exact=True, attempt=1) for rid in ("later", "same")))
    rig.run()
    assert finishes(rig, "later", "same") == ["length", "abort"]


@pytest.mark.parametrize("depth", [0, 1])
def test_abort_ends_running_and_waiting_requests_without_a_reply(depth: int) -> None:
    rig = Rig(depth, max_running=1)
    rig.inbox.put(tokenized("a_0", PROMPT, 50), tokenized("a_1", PROMPT, 50), tokenized("b", PROMPT, 3))
    rig.scheduler.step()
    rig.scheduler.step()
    rig.inbox.put(Abort(rid="a", abort_message="enough"))
    rig.run()
    assert finishes(rig, "a_0", "a_1", "b") == ["abort", "abort", "length"]
    assert {rig.tokens(rid)[-1].finish.message for rid in ("a_0", "a_1")} == {"enough"}  # type: ignore[union-attr]
    assert replies(rig) == []


# flush


def test_an_idle_cache_is_flushed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 2))
    rig.run()
    assert rig.scheduler.planner.pool.tree.cached > 0
    rig.inbox.put(FlushCache(id="f"))
    with caplog.at_level(logging.INFO):
        rig.run()
    assert replies(rig) == [Reply(id="f", message=FLUSHED)]
    assert "Cache flushed successfully!" in caplog.messages
    assert rig.scheduler.planner.pool.tree.cached == 0


def test_a_busy_cache_is_not_flushed_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(max_running=1)
    rig.inbox.put(tokenized("a", PROMPT, 5), tokenized("b", PROMPT, 5))
    rig.scheduler.step()
    rig.inbox.put(FlushCache(id="f"))
    with caplog.at_level(logging.INFO):
        rig.scheduler.step()
    assert replies(rig) == [Reply(id="f", success=False, message=FLUSH_FAILED, status=400)]
    assert "Cache not flushed because there are pending requests. #queue-req: 1, #running-req: 1" in caplog.messages


def test_a_flush_with_time_waits_for_idleness() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 5), FlushCache(id="f", timeout=100.0))
    rig.run()
    rig.scheduler.step()
    assert replies(rig) == [Reply(id="f", message=FLUSHED)]


def test_a_flush_is_refused_after_its_timeout_and_the_request_goes_on() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 20), FlushCache(id="f", timeout=5.0))
    rig.run()
    assert replies(rig) == [Reply(id="f", success=False, message=FLUSH_TIMED_OUT, status=400)]
    assert finishes(rig, "a") == ["length"]


def test_only_one_flush_waits_at_a_time() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 5))
    rig.inbox.put(FlushCache(id="f", timeout=100.0), FlushCache(id="g", timeout=100.0))
    rig.run()
    rig.scheduler.step()
    assert {(reply.id, reply.message) for reply in replies(rig)} == {("f", FLUSHED), ("g", FLUSH_IN_PROGRESS)}


def test_a_scheduler_without_memory_still_resumes_unfinished_commands() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 5))
    rig.scheduler.step()
    rig.scheduler.planner.asleep = True
    rig.inbox.put(FlushCache(id="f", timeout=3.0))
    rig.scheduler.step()
    rig.scheduler.step()
    assert rig.inbox.waits == [COMMAND_POLL_S]
    rig.time += 4.0
    rig.scheduler.step()
    assert replies(rig)[0].message == FLUSH_TIMED_OUT


# probe


def test_a_probe_gets_the_schedulers_counters_and_is_sent_on() -> None:
    rig = Rig(max_running=1)
    rig.inbox.put(tokenized("a", PROMPT, 50), tokenized("b", PROMPT, 50))
    for _ in range(3):
        rig.scheduler.step()
    rig.inbox.put(Probe(id="p", counters={"tokenizer": {"x": 1}}))
    rig.scheduler.step()
    (probe,) = [m for m in rig.outbox.messages if isinstance(m, Probe)]
    assert probe.counters["tokenizer"] == {"x": 1}
    counters = probe.counters["scheduler"]
    assert (counters["num_running_reqs"], counters["num_queue_reqs"]) == (1, 1)
    assert counters["num_used_tokens"] == 9 and counters["max_total_num_tokens"] == 1000
    assert counters["prompt_tokens_total"] == 7 and counters["generation_tokens_total"] == 3
    assert counters["weight_version"] == "default"


# commands that come again


def test_a_command_that_is_sent_again_gets_its_reply_again_and_does_not_run_again() -> None:
    rig = Rig()
    rig.inbox.put(SlowDown(id="s", forward_sleep_time=0.5), SlowDown(id="t"), SlowDown(id="s", forward_sleep_time=0.5))
    rig.scheduler.step()
    assert rig.scheduler.step_sleep_s == 0.0
    assert [reply.id for reply in replies(rig)] == ["s", "t", "s"]


def test_an_unfinished_command_that_is_sent_again_is_answered_once() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 5), FlushCache(id="f", timeout=100.0), FlushCache(id="f", timeout=100.0))
    rig.run()
    rig.scheduler.step()
    assert [reply.message for reply in replies(rig)] == [FLUSHED]


# started again


def test_messages_for_an_earlier_scheduler_are_ignored() -> None:
    rig = restarted()
    rig.inbox.put(tokenized("before", PROMPT, 2, epoch=1), tokenized("now", PROMPT, 2, epoch=2))
    rig.inbox.put(PauseGeneration(id="before", epoch=1), FlushCache(id="now", epoch=2, timeout=100.0))
    rig.run()
    rig.scheduler.step()
    assert not rig.tokens("before") and finishes(rig, "now") == ["length"]
    assert [(r.id, r.success, r.status, r.message) for r in replies(rig)] == [
        ("before", False, 503, COMMAND_LOST),
        ("now", True, 200, FLUSHED),
    ]


def test_the_state_is_told_in_front_of_each_answer_refusals_too() -> None:
    rig = restarted()
    rig.inbox.put(PauseGeneration(id="p"), FlushCache(id="f"))
    rig.run()
    rig.inbox.put(ContinueGeneration(id="c"), FlushCache(id="old", epoch=1))
    rig.run()
    told = [message.state["paused"] if isinstance(message, Facts) else message.id for message in rig.outbox.messages]
    assert told == [True, "p", "f", False, "c", "old"]


def restarted(**changes: Any) -> Rig:
    """A scheduler of epoch 2."""
    rig = Rig(**changes)
    rig.scheduler.facts = Facts(
        epoch=2, max_total_num_tokens=9, max_req_input_len=8, context_length=8, vocab_size=VOCABULARY
    )
    return rig


def test_a_new_gateway_gets_the_facts_and_requests_of_the_earlier_one_end() -> None:
    rig = restarted(max_running=1)
    rig.inbox.put(tokenized("running", PROMPT, 50, epoch=2), tokenized("waiting", PROMPT, 50, epoch=2))
    for _ in range(3):
        rig.scheduler.step()
    assert rig.tokens("running")
    sent = len(rig.outbox.messages)
    rig.inbox.put(PauseGeneration(id="p", mode="in_place"), Restarted(role="gateway", least_attempt=5))
    rig.inbox.put(tokenized("late", PROMPT, 2, epoch=2), tokenized("new", PROMPT, 2, attempt=5, epoch=2))
    rig.scheduler.step()
    told = [message for message in rig.outbox.messages[sent:] if not isinstance(message, Tokens | Reply)]
    state = {"weight_version": "default", "paused": True, "asleep": False, "lacks": []}
    assert told == [msgspec.structs.replace(rig.scheduler.facts, state=state)] * 2  # for the reply and the gateway
    rig.inbox.put(ContinueGeneration(id="c"))
    rig.run()
    assert finishes(rig, "new") == ["length"]
    assert finishes(rig, "running", "waiting") == ["abort", "abort"]
    assert not rig.tokens("late")
    rig.scheduler.planner.check_invariants()
