"""Metrics that do not come from requests."""

import os
import re
from functools import partial
from pathlib import Path

from quartet.http_gateway.http.metrics import Metrics
from quartet.runtime.messages import ROLES, Finish, Generate, Message
from quartet.runtime.sockets import newest_epoch, point_stable_path
from tests.unit.http_gateway.harness import asynchronous, never_again, served, step, words


@asynchronous
async def test_restarts_are_those_that_the_launcher_announces_so_that_a_new_gateway_counts_on(tmp_path: Path) -> None:
    for role, epoch in zip(ROLES, (2, 0, 11, 1), strict=True):
        point_stable_path(str(tmp_path), role, epoch)
    for _ in ("a gateway", "the one after it"):
        text = (await Metrics("m", partial(newest_epoch, str(tmp_path))).text({})).decode()
        assert [line for line in text.splitlines() if line.startswith("quartet:restarts")] == [
            'quartet:restarts_total{role="gateway"} 2.0',
            'quartet:restarts_total{role="tokenizer"} 0.0',
            'quartet:restarts_total{role="scheduler"} 11.0',
            'quartet:restarts_total{role="detokenizer"} 1.0',
        ]


@asynchronous
async def test_each_process_shows_its_cpu_time_and_memory_and_one_that_has_ended_none() -> None:
    metrics = Metrics("m", never_again, lambda: {"gateway": os.getpid(), "scheduler": 1 << 30})
    found = samples(await metrics.text({}))
    assert found['quartet:process_pid{role="gateway"}'] == os.getpid()
    assert found['quartet:process_cpu_seconds_total{role="gateway"}'] > 0
    assert found['quartet:process_resident_memory_bytes{role="gateway"}'] > 1 << 20
    assert not [name for name in found if "process_" in name and "scheduler" in name]


@asynchronous
async def test_what_is_counted_is_a_counter_and_what_is_now_a_gauge() -> None:
    counters = {
        "scheduler": {"num_retracted_requests_total": 2, "num_queue_reqs": 1},
        "tokenizer": {"prompts": 7, "waiting": 1, "failed_messages_total": 0},
        "detokenizer": {"tokens": 9, "running": 1},
    }
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", (await Metrics("m", never_again).text(counters)).decode(), re.M))
    counted = [
        "sglang:num_retracted_requests_total",
        "quartet:tokenizer_prompts_total",
        "quartet:tokenizer_failed_messages_total",
        "quartet:detokenizer_tokens_total",
        "sglang:num_requests_total",
    ]
    assert {kinds[name] for name in counted} == {"counter"}
    gauges = ("sglang:num_queue_reqs", "quartet:tokenizer_waiting", "quartet:detokenizer_running")
    assert {kinds[name] for name in gauges} == {"gauge"}
    assert kinds["sglang:queue_time_seconds"] == "histogram"


@asynchronous
async def test_a_time_in_the_queue_counts_once_for_each_request() -> None:
    def queued(generate: Generate) -> list[Message]:
        rid = generate.request.rid
        first = step(rid, [1], "a", prompt_tokens=3, queue_s=0.02)
        return [first, step(rid, [2], "b", finish=Finish(reason="stop", matched=2))]

    async with served(queued) as server:
        await server.client.post("/generate", {"text": ["x", "y"]})
        found = samples((await server.client.get("/metrics")).body)
    labels = 'model_name="qwen/qwen2.5-0.5b-instruct"'
    assert found[f"sglang:queue_time_seconds_count{{{labels}}}"] == 2
    assert found[f'sglang:queue_time_seconds_bucket{{le="0.01",{labels}}}'] == 0
    assert found[f'sglang:queue_time_seconds_bucket{{le="0.05",{labels}}}'] == 2


@asynchronous
async def test_requests_for_structured_output_are_counted_beside_all() -> None:
    async with served(words("a")) as server:
        await server.client.post("/generate", {"text": "x", "sampling_params": {"regex": "a"}})
        await server.client.post("/generate", {"text": "x"})
        found = samples((await server.client.get("/metrics")).body)
    labels = 'model_name="qwen/qwen2.5-0.5b-instruct"'
    assert found[f"sglang:num_so_requests_total{{{labels}}}"] == 1
    assert found[f"sglang:num_requests_total{{{labels}}}"] == 2


@asynchronous
async def test_labels_do_not_grow_with_what_clients_make_up() -> None:
    async with served() as server:
        for number in range(5):
            await server.client.call(f"MADE{number}", f"/made/{number}")
        found = samples((await server.client.get("/metrics")).body)
    assert found['sglang:http_requests_total{endpoint="unmatched",method="other"}'] == 5
    assert not [name for name in found if "MADE" in name or "/made" in name]


def samples(text: bytes) -> dict[str, float]:
    """Name with labels → value."""
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
