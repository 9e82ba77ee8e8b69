"""Traces as a collector gets them."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from quartet.http_gateway.app import build
from quartet.http_gateway.http.tracing import REPORT_EVERY_S, Losses, OtlpTracer
from quartet.runtime.messages import Finish, Generate, Message
from tests.collector import Collector, collecting
from tests.unit.http_gateway.harness import Client, asynchronous, served, step

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HOPS = ["tokenizer", "queue", "prefill", "decode", "detokenizer"]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


def hop_by_hop(generate: Generate) -> list[Message]:
    """The answer of a ring whose hops write their times."""
    now, times = time.monotonic(), generate.times
    if times is not None:
        times.tokenized_at = times.queued_at = times.started_at = now
        times.first_token_at = times.finished_at = times.text_at = now
    rid = generate.request.rid
    first = step(rid, [1], "a", prompt_tokens=3, queue_s=0.0, times=times)
    return [first, step(rid, [2], "b", times=times, finish=Finish(reason="stop", matched=2))]


async def traced(collector: Collector, ratio: float, *calls: dict[str, str]) -> list[Any]:
    """The spans of calls with these headers."""
    tracer = OtlpTracer(collector.url, ratio, "m")
    async with served(hop_by_hop) as server:
        server.gateway.tracer = tracer
        client = Client(build(server.gateway))
        for headers in calls:
            assert (await client.post("/generate", {"text": "secret"}, headers=headers)).status == 200
    await tracer.close()
    return collector.spans


@asynchronous
async def test_a_call_is_a_span_and_each_hop_one_below_it(collector: Collector) -> None:
    spans = await traced(collector, 1.0, {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"})
    assert collector.paths == ["/v1/traces"]
    *below, root = spans
    assert (root.name, root.trace_id.hex(), root.parent_span_id.hex()) == ("POST /generate", TRACE, PARENT)
    assert [span.name for span in below] == HOPS
    assert {span.parent_span_id for span in below} == {root.span_id}
    assert all(root.start_time_unix_nano <= span.start_time_unix_nano for span in below)
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano for span in spans)
    assert abs(root.end_time_unix_nano / 1e9 - time.time()) < 60
    said = {item.key: item.value for item in root.attributes}
    assert said["gen_ai.usage.output_tokens"].int_value == 2
    assert said["http.response.status_code"].int_value == 200
    assert said["quartet.request_id"].string_value == "mine"
    assert "secret" not in str(spans)


@asynchronous
async def test_the_clients_decision_counts_before_the_ratio(collector: Collector) -> None:
    parents = [{"traceparent": f"00-{TRACE}-{PARENT}-{flag}"} for flag in ("00", "01")]
    spans = await traced(collector, 1.0, parents[0])
    assert spans == []
    assert len(await traced(collector, 0.0, parents[1], {}, {"traceparent": "nonsense"})) == 1 + len(HOPS)


@asynchronous
async def test_a_call_that_is_not_sampled_carries_nothing_round_the_ring() -> None:
    tracer = OtlpTracer("http://127.0.0.1:9/v1/traces", 0.0, "m")
    async with served(hop_by_hop) as server:
        server.gateway.tracer = tracer
        await Client(build(server.gateway)).post("/generate", {"text": "x"})
        [generate] = await server.ring.sent_of(Generate)
    assert generate.times is None
    await tracer.close()


@pytest.mark.parametrize("status", [400, 503, 0])
@asynchronous
async def test_a_collector_that_fails_holds_nothing_up(
    collector: Collector, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = status
    if not status:
        await asyncio.to_thread(collector.shutdown)
        collector.server_close()
    await traced(collector, 1.0, {}, {}, {})
    [said] = [line for line in caplog.messages if "Traces cannot be sent" in line]
    assert said.endswith(f"; {3 * (1 + len(HOPS))} spans are lost.")
    assert "Traceback" not in caplog.text


def test_losses_are_told_at_once_then_once_a_minute_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    losses = Losses("http://collector", clock=lambda: now[0])
    for _ in range(20):
        losses.end()
    losses.send(3)
    losses.lose(2, "refused")
    losses.lose(4, "refused")  # within the minute
    now[0] = REPORT_EVERY_S
    losses.lose(1, "timeout")
    losses.lose(2, "timeout")
    losses.close()
    losses.lose(8, "too late")  # the SDK's thread gives up after the end: they are told already
    assert caplog.messages == [
        "Traces cannot be sent to http://collector (refused); 2 spans are lost.",
        "Traces cannot be sent to http://collector (timeout); 5 spans are lost.",
        "Traces cannot be sent to http://collector (the server ends); 10 spans are lost.",
    ]


def test_nothing_is_said_where_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    losses = Losses("http://collector")
    losses.end()
    losses.send(1)
    losses.close()
    assert caplog.messages == []
