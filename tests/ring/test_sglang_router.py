"""Two servers behind the real sglang-router: policies, registration, load, deaths and drains."""

import importlib.util
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from quartet.http_gateway.admin.info import FRESH_S
from tests.ring.test_recovery import Stream
from tests.servers import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("sglang_router") is None,
        reason="sglang-router is not installed here: pip install sglang-router",
    ),
]

WAIT_S = 120
FLAGS = ("--model-path", "demo", "--dtype", "float32", "--page-size", "4", "--device", "cpu")
LONG = [f"{number} is the number of this story, which is told at some length. " * 20 for number in range(6)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Router:
    """A router process."""

    def __init__(self, url: str, process: "subprocess.Popen[bytes]") -> None:
        self.url, self.process = url, process

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=WAIT_S)

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = requests.get(f"{self.url}/workers", timeout=WAIT_S).json()["workers"]
        return found

    def wait_for_healthy(self, count: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while sum(worker["is_healthy"] for worker in self.workers()) != count:
            assert time.monotonic() < deadline, self.workers()
            time.sleep(0.05)


@contextmanager
def routed(policy: str, *servers: Server) -> Iterator[Router]:
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port), "--policy", policy, "--prometheus-port", str(free_port())]
    flags += ["--health-check-interval-secs", "1", "--health-failure-threshold", "1", "--log-level", "warn"]
    urls = ["--worker-urls", *(server.url for server in servers)] if servers else []
    process = subprocess.Popen([sys.executable, "-m", "sglang_router.launch_router", *flags, *urls])
    router = Router(f"http://127.0.0.1:{port}", process)
    try:
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                requests.get(f"{router.url}/liveness", timeout=1)
                break
            except requests.RequestException:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        router.wait_for_healthy(len(servers))
        yield router
    finally:
        process.terminate()
        process.wait(120)


@pytest.fixture(scope="module")
def servers(launch_for_module: Callable[..., Server]) -> list[Server]:
    return [launch_for_module(*FLAGS, "--served-model-name", "demo") for _ in range(2)]


def completed(server: Server) -> int:
    """Requests that it has answered; not from counters that it has kept for a moment."""
    time.sleep(1.1 * FRESH_S)
    info = requests.get(f"{server.url}/get_server_info", timeout=WAIT_S).json()
    return int(info["internal_states"][0]["num_requests_total"])


def generate(router: Router, text: str) -> dict[str, Any]:
    body = {"text": text, "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
    answer = router.post("/generate", body)
    assert answer.status_code == 200, answer.text
    meta: dict[str, Any] = answer.json()["meta_info"]
    return meta


@pytest.mark.parametrize("policy", ["random", "round_robin", "power_of_two", "cache_aware"])
def test_every_policy_reaches_both_servers_through_every_api(servers: list[Server], policy: str) -> None:
    before = [completed(server) for server in servers]
    with routed(policy, *servers) as router:
        for number in range(16):
            generate(router, f"{number * 7919} is a number")
        chat = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        assert router.post("/v1/chat/completions", chat).status_code == 200
        assert router.post("/v1/completions", {"model": "demo", "prompt": "Hi", "max_tokens": 2}).status_code == 200
        models = requests.get(f"{router.url}/v1/models", timeout=WAIT_S).json()["data"]
        assert [model["id"] for model in models] == ["demo"]
    more = [completed(server) - count for server, count in zip(servers, before, strict=True)]
    assert sum(more) >= 18
    if policy != "cache_aware":  # which keeps short prompts together
        assert min(more) > 0


def test_prompts_with_a_known_beginning_go_where_it_is_cached(servers: list[Server]) -> None:
    with routed("cache_aware", *servers) as router:
        for prompt in LONG:
            generate(router, prompt)
        again = [generate(router, prompt + "And so on.") for prompt in LONG]
        assert all(meta["cached_tokens"] > 0.8 * meta["prompt_tokens"] for meta in again)
        loads = requests.get(f"{router.url}/get_loads", timeout=WAIT_S).json()["workers"]
        assert {load["load"] for load in loads} == {0}


def test_servers_can_be_registered_and_taken_out(servers: list[Server]) -> None:
    with routed("round_robin", servers[0]) as router:
        assert router.post("/workers", {"url": servers[1].url}).status_code in (200, 202)
        router.wait_for_healthy(2)
        before = completed(servers[1])
        for number in range(4):
            generate(router, f"{number}")
        assert completed(servers[1]) > before
        gone = next(worker["id"] for worker in router.workers() if worker["url"] == servers[0].url)
        assert requests.delete(f"{router.url}/workers/{gone}", timeout=WAIT_S).status_code in (200, 202)
        router.wait_for_healthy(1)
        before = completed(servers[0])
        for number in range(4):
            generate(router, f"{number}")
        assert completed(servers[0]) == before


def stream_body(number: int) -> dict[str, Any]:
    params = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
    return {"text": f"The capital of land {number} is", "sampling_params": params}


def test_a_server_that_is_drained_finishes_its_streams_and_new_requests_go_to_the_other(
    launch: Callable[..., Server], servers: list[Server]
) -> None:
    leaving = launch(*FLAGS)
    with routed("round_robin", servers[0], leaving) as router:
        streams = [Stream(router.url, stream_body(number)) for number in range(8)]
        for stream in streams:
            stream.reach(5)
        leaving.signal()
        late = [generate(router, f"{number}") for number in range(8)]  # a refused connection is tried elsewhere
        assert len(late) == 8
        for stream in streams:
            assert stream.answers()[0]["ids"][199:]
        assert leaving.wait() == 0


def test_after_a_kill_new_requests_go_to_the_other_and_what_streamed_is_cut_off(
    launch: Callable[..., Server], servers: list[Server]
) -> None:
    """The router passes bytes on and does not know how to resume: the client sees its stream end early."""
    dying = launch(*FLAGS)
    with routed("round_robin", servers[0], dying) as router:
        streams = [Stream(router.url, stream_body(number)) for number in range(8)]
        for stream in streams:
            stream.reach(5)
        dying.process.kill()
        for stream in streams:
            stream.join(WAIT_S)
        whole = [stream for stream in streams if stream.made == 200]
        assert len(whole) == 4
        for stream in streams:
            if stream not in whole:
                assert stream.error is not None or not stream.events[-1]["meta_info"]["finish_reason"]
        for number in range(8):
            generate(router, f"{number}")


def test_a_process_of_a_ring_that_dies_is_not_noticed(servers: list[Server]) -> None:
    with routed("round_robin", *servers) as router:
        streams = [Stream(router.url, stream_body(number)) for number in range(8)]
        for stream in streams:
            stream.reach(5)
        killer = threading.Thread(target=lambda: servers[0].children()["scheduler"].kill())
        killer.start()
        for stream in streams:
            assert len(stream.answers()[0]["ids"]) == 200
        killer.join()
