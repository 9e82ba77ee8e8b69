"""Time limits and priorities through the whole ring, with a scheduler whose steps take their time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from tests.servers import Server

WAIT_S = 60
SLOW = {"QUARTET_FAKE_STEP_S": "0.02", "QUARTET_FAKE_RUNNING": "1"}
LONG = {"max_new_tokens": 1500, "ignore_eos": True}


def generate(server: Server, **body: Any) -> requests.Response:
    return requests.post(f"{server.url}/generate", json={"text": "hi", **body}, timeout=WAIT_S)


def test_requests_that_wait_or_run_too_long_are_a_503_that_says_which(launch_fake: Callable[..., Server]) -> None:
    limits = {"SGLANG_REQ_WAITING_TIMEOUT": "0.5", "SGLANG_REQ_RUNNING_TIMEOUT": "1.5"}
    server = launch_fake("--model-path", "demo", environment=SLOW | limits)
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda _: generate(server, sampling_params=LONG), range(2)))
    assert [answer.status_code for answer in answers] == [503, 503]
    assert {answer.json()["message"] for answer in answers} == {
        "Request running timeout reached.",
        "Request waiting timeout reached.",
    }
    assert generate(server, sampling_params={"max_new_tokens": 4}).status_code == 200


def test_a_request_of_higher_priority_overtakes_one_that_runs(launch_fake: Callable[..., Server]) -> None:
    server = launch_fake("--model-path", "demo", "--enable-priority-scheduling", environment=SLOW)
    start = len(server.log)
    with ThreadPoolExecutor(1) as client:
        slow = client.submit(generate, server, sampling_params={**LONG, "max_new_tokens": 200})
        server.wait_for_match("Prefill batch", start)
        fast = generate(server, priority=11, sampling_params={"max_new_tokens": 4})
        assert fast.status_code == 200
        assert not slow.done()
        answer = slow.result(WAIT_S).json()
    assert answer["meta_info"]["completion_tokens"] == 200
    assert "Preempt requests of lower priority. #preempted_reqs: 1" in server.log
