import logging

import pytest

from quartet.scheduler_service.core.drafts import DraftOptions
from tests.fakes import looping_token
from tests.rig import PROMPT, Rig
from tests.stepper import tokenized


def test_prefill_and_decode_lines_read_as_tools_expect(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 42))
    with caplog.at_level(logging.INFO):
        rig.run()
    assert caplog.messages == [
        "Prefill batch. #new-seq: 1, #new-token: 7, #cached-token: 0, token usage: 0.00, "
        "#running-req: 0, #queue-req: 0, ",
        "Decode batch. #running-req: 1, #token: 47, token usage: 0.05, cuda graph: False, "
        "gen throughput (token/s): 1.02, #queue-req: 0, ",
    ]


def test_the_decode_line_and_the_counters_report_the_acceptance_of_drafts(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(model=looping_token, drafts=DraftOptions(8, 2, 8))
    rig.inbox.put(tokenized("a", PROMPT, 300))
    with caplog.at_level(logging.INFO):
        rig.run()
    stats, counters = rig.scheduler.planner.stats, rig.scheduler.counters()
    assert stats.correct_drafts > 100
    steps = counters["decode_steps_total"]
    assert (
        counters["avg_spec_accept_length"]
        == pytest.approx(1 + stats.correct_drafts / steps)
        == pytest.approx(299 / steps)
    )
    assert 1 < counters["spec_accept_length"] < 9 and 0 < counters["spec_accept_rate"] < 1
    lines = [message for message in caplog.messages if message.startswith("Decode")]
    assert f"accept len: {counters['spec_accept_length']:.2f}, cuda graph: False, " in lines[-1]
    assert len([message for message in caplog.messages if message.startswith("Prefill")]) == 1


def test_counters_of_drafts_exist_with_speculation_only() -> None:
    assert not any("spec" in name for name in Rig().scheduler.counters())


def test_the_decode_counter_runs_from_the_start_over_all_requests(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.inbox.put(tokenized("warm-up", [5, 6], 8))
    rig.run()
    rig.inbox.put(tokenized("a", PROMPT, 60))
    with caplog.at_level(logging.INFO):
        rig.run()
    (line,) = [message for message in caplog.messages if message.startswith("Decode")]
    assert "#token: 40," in line  # 7 prompt tokens and this request's 33rd decode step


def test_cached_tokens_and_queue_show_in_the_prefill_line(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(max_running=1)
    rig.inbox.put(tokenized("a", PROMPT, 1))
    rig.run()
    rig.inbox.put(tokenized("b", [*PROMPT, 99], 1), tokenized("c", PROMPT, 1))
    with caplog.at_level(logging.INFO):
        rig.scheduler.step()
    assert caplog.messages[0].startswith("Prefill batch. #new-seq: 1, #new-token: 1, #cached-token: 7, ")
    assert caplog.messages[0].endswith("#running-req: 0, #queue-req: 1, ")


def test_retractions_are_logged_with_the_ratio(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(total_pages=30)
    rig.scheduler.planner.growth.ratio = 0.0
    rig.inbox.put(tokenized("a", [10, 11], 20), tokenized("b", [20, 21], 20))
    with caplog.at_level(logging.WARNING):
        rig.run()
    assert caplog.messages[0].startswith(
        "KV cache pool is full. Retract requests. #retracted_reqs: 1, #new_token_ratio: 0.1000 -> 0.3"
    )


def test_preemptions_are_logged_apart_from_retractions(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(max_running=1, policy="priority", preemption_threshold=0)
    rig.inbox.put(tokenized("low", [10, 11], 20))
    rig.scheduler.step()
    rig.inbox.put(tokenized("high", [20, 21], 2, priority=1))
    with caplog.at_level(logging.INFO):
        rig.run()
    assert "Preempt requests of lower priority. #preempted_reqs: 1" in caplog.messages
    assert not any("KV cache pool is full" in message for message in caplog.messages)
    counters = rig.scheduler.counters()
    assert (counters["total_preempted_reqs"], counters["total_retracted_reqs"]) == (1, 0)
