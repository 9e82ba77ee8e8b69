"""The health answers."""

from math import inf
from pathlib import Path
from typing import Any

import pytest

from quartet.http_gateway.routes.gateway import Phase
from quartet.runtime.control import Abort
from quartet.runtime.messages import Finish, Generate
from quartet.runtime.sockets import point_stable_path
from tests.unit.http_gateway.harness import FakeProgress, asynchronous, ends, served, step

ONE_TOKEN = ends(Finish(reason="length", length=1))


@pytest.mark.parametrize("path", ["/readyz", "/ready", "/health", "/health_generate"])
@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.DRAINING])
@asynchronous
async def test_no_traffic_is_wanted_while_starting_or_draining(path: str, phase: Phase) -> None:
    async with served(ONE_TOKEN) as server:
        server.gateway.phase = phase
        answer = await server.client.get(path)
        assert (answer.status, answer.json()["reason"]) == (503, phase.value)
        assert (await server.client.get("/livez")).status == 200


@asynchronous
async def test_models_answer_before_the_warm_up_ends() -> None:
    async with served() as server:
        server.gateway.phase = Phase.STARTING
        assert (await server.client.get("/v1/models")).status == 200


@asynchronous
async def test_health_asks_nothing_of_the_ring() -> None:
    async with served() as server:
        answer = await server.client.get("/health")
        assert (answer.status, answer.body) == (200, b"")
        assert server.ring.sent == []


@pytest.mark.parametrize(
    ("progress", "status"),
    [
        (FakeProgress(age_s=19, busy=True), 200),
        (FakeProgress(age_s=21, busy=True), 503),
        (FakeProgress(age_s=900, busy=False), 200),
    ],
)
@asynchronous
async def test_health_is_the_age_of_the_progress_word_while_there_is_work(progress: FakeProgress, status: int) -> None:
    async with served() as server:
        server.gateway.progress = progress
        assert (await server.client.get("/health")).status == status


@asynchronous
async def test_health_generate_sends_one_token_for_all_who_ask_at_once() -> None:
    async with served() as server:
        calls = [server.client.start("GET", "/health_generate") for _ in range(5)]
        [probe] = await server.ring.sent_of(Generate)
        assert (probe.request.params.max_new_tokens, probe.request.log_metrics) == (1, False)
        server.ring.push(step(probe.request.rid, [1], finish=Finish(reason="length", length=1)))
        assert {(await call.answer()).status for call in calls} == {200}
        assert len(await server.ring.sent_of(Generate)) == 1


@asynchronous
async def test_a_server_that_is_full_is_well() -> None:
    async with served(limit=1) as server:
        running = server.client.start("POST", "/generate", {"text": "hi", "rid": "r"})
        await server.ring.sent_of(Generate)
        assert (await server.client.post("/generate", {"text": "hi"})).status == 503
        call = server.client.start("GET", "/health_generate")
        probe = (await server.ring.sent_of(Generate, 2))[-1]
        for rid in (probe.request.rid, "r"):
            server.ring.push(step(rid, [1], finish=Finish(reason="length", length=1)))
        assert [(await each.answer()).status for each in (call, running)] == [200, 200]


@asynchronous
async def test_health_generate_without_an_answer_is_503_and_leaves_no_request() -> None:
    async with served() as server:
        server.gateway.health_probe._timeout_s = 0.001
        assert (await server.client.get("/health_generate")).status == 503
        assert len(await server.ring.sent_of(Abort)) == 1


@pytest.mark.parametrize(
    ("state", "status", "reason"),
    [
        ({"paused": True}, 200, "generation is paused"),
        ({"asleep": True, "lacks": ["weights", "kv_cache"]}, 200, "memory is released: weights, kv_cache"),
        ({"asleep": True, "lacks": []}, 503, "no update has written all of them since"),
        ({"asleep": False, "lacks": []}, 200, ""),
    ],
)
@asynchronous
async def test_health_says_why_nothing_can_be_generated(state: dict[str, Any], status: int, reason: str) -> None:
    async with served(ONE_TOKEN) as server:
        server.gateway.learn(state)
        probe = await server.client.get("/health_generate")
        assert probe.status == status
        for answer in (probe, await server.client.get("/health")):
            assert reason in answer.json()["reason"] if reason else answer.body == b""
        assert (await server.client.get("/readyz")).status == (503 if reason else 200)


class Frozen:
    def __init__(self, age_s: float) -> None:
        self._age_s = age_s

    def pulse_age_s(self) -> float:
        return self._age_s


@pytest.mark.parametrize("role", ["tokenizer", "scheduler", "detokenizer"])
@asynchronous
async def test_health_tells_at_once_when_a_process_does_not_run(role: str) -> None:
    async with served(ONE_TOKEN) as server:
        for age_s, status in ((1.0, 200), (6.0, 503), (inf, 200)):
            server.gateway.hops = {role: Frozen(age_s)}
            for path in ("/health", "/readyz", "/health_generate"):
                answer = await server.client.get(path)
                assert answer.status == status
                assert status == 200 or answer.json()["reason"] == f"the {role} has not run for 6 s"
        assert (await server.client.get("/livez")).status == 200


@asynchronous
async def test_a_process_that_is_started_again_is_missing_and_not_frozen(tmp_path: Path) -> None:
    async with served(ONE_TOKEN) as server:
        server.gateway.run_dir = str(tmp_path)
        server.gateway.hops = {"tokenizer": Frozen(6.0)}
        point_stable_path(str(tmp_path), "tokenizer", 1)
        assert (await server.client.get("/health")).status == 200
        assert (await server.client.get("/readyz")).json()["reason"] == "the tokenizer is being started again"


@asynchronous
async def test_a_server_that_lacks_a_process_is_well_and_wants_no_traffic(tmp_path: Path) -> None:
    async with served() as server:
        server.gateway.run_dir = str(tmp_path)
        for role in ("tokenizer", "scheduler", "detokenizer"):
            point_stable_path(str(tmp_path), role, 0)
            (tmp_path / f"{role}.0").touch()
        assert (await server.client.get("/readyz")).status == 200
        point_stable_path(str(tmp_path), "scheduler", 1)  # which is not there yet
        answer = await server.client.get("/readyz")
        assert (answer.status, answer.json()["reason"]) == (503, "the scheduler is being started again")
        assert (await server.client.get("/health")).status == 200


@pytest.mark.parametrize("path", ["/health", "/health_generate", "/readyz"])
@asynchronous
async def test_a_server_that_sleeps_is_healthy_and_asking_does_not_wake_it(path: str) -> None:
    async with served() as server:
        server.gateway.learn({"sleeping": True, "asleep": False, "lacks": []})
        answer = await server.client.get(path)
        assert answer.status == 200
        assert path == "/readyz" or answer.json()["status"] == "sleeping"
        assert server.ring.sent == []
        server.gateway.progress = FakeProgress(age_s=900, busy=True)
        assert path == "/readyz" or (await server.client.get(path)).status == 503


@pytest.mark.parametrize("path", ["/ping", "/livez", "/readyz", "/ready", "/health", "/healthz", "/metrics"])
@asynchronous
async def test_head_answers_like_get(path: str) -> None:
    async with served(enable_metrics=True) as server:
        for phase in (Phase.UP, Phase.DRAINING):
            server.gateway.phase = phase
            asked, got = [await server.client.call(method, path) for method in ("HEAD", "GET")]
            assert (asked.status, asked.headers.keys()) == (got.status, got.headers.keys())
