"""The gateway in a real ring: launcher, tokenizer and detokenizer as they are, a scheduler with a fake worker."""

import itertools
import json
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import requests

from tests.ring.conftest import FAKE_SCHEDULER
from tests.servers import Server

WAIT_S = 120
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server]) -> Server:
    return launch_for_module("--page-size", "4", services=FAKE_SCHEDULER)


SLOW = {"QUARTET_FAKE_STEP_S": "0.02"}  # a request is still running when the test acts


@pytest.fixture(scope="module")
def slow(launch_for_module: Callable[..., Server]) -> Server:
    return launch_for_module(services=FAKE_SCHEDULER, environment=SLOW)


@pytest.fixture
def slow_server(launch_fake: Callable[..., Server]) -> Callable[..., Server]:
    """Starts one that its test ends."""
    return lambda *flags: launch_fake(*flags, environment=SLOW)


def generate(server: Server, body: dict[str, Any], **options: Any) -> requests.Response:
    return requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S, **options)


def events(answer: requests.Response) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def params(**values: Any) -> dict[str, Any]:
    return {"temperature": 0, "ignore_eos": True, **values}


def test_text_ids_and_logprobs_agree_in_length(server: Server) -> None:
    body = {"text": QUESTION, "sampling_params": params(max_new_tokens=20), "return_logprob": True}
    answer = generate(server, {**body, "logprob_start_len": 0}).json()
    meta = answer["meta_info"]
    assert len(answer["output_ids"]) == meta["completion_tokens"] == len(meta["output_token_logprobs"]) == 20
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    assert meta["input_token_logprobs"][0][0] is None
    assert [token for _, token, _ in meta["output_token_logprobs"]] == answer["output_ids"]


def test_a_stream_ends_with_the_text_of_the_whole_answer(server: Server) -> None:
    body = {"text": QUESTION, "sampling_params": params(max_new_tokens=30, sampling_seed=1)}
    whole = generate(server, body).json()
    chunks = events(generate(server, {**body, "stream": True}, stream=True))
    assert chunks[-1]["text"] == whole["text"]
    assert chunks[-1]["output_ids"] == whole["output_ids"]
    assert all(later["text"].startswith(chunk["text"]) for chunk, later in itertools.pairwise(chunks))


def test_the_same_prompt_again_is_found_in_the_cache(server: Server) -> None:
    body = {"input_ids": list(range(10, 42)), "sampling_params": params(max_new_tokens=1)}
    generate(server, body)
    assert generate(server, body).json()["meta_info"]["cached_tokens"] >= 28
    assert requests.post(f"{server.url}/flush_cache", timeout=WAIT_S).status_code == 200
    assert generate(server, body).json()["meta_info"]["cached_tokens"] == 0


def test_copies_find_their_prompt_in_the_cache_and_differ(server: Server) -> None:
    body = {"input_ids": list(range(50, 90)), "sampling_params": params(max_new_tokens=8, n=4)}
    answers = generate(server, body).json()
    assert all(answer["meta_info"]["cached_tokens"] >= 36 for answer in answers)
    assert len({answer["text"] for answer in answers}) == 4


def test_a_stop_string_found_by_the_detokenizer_ends_the_request_everywhere(server: Server) -> None:
    body = {"text": QUESTION, "sampling_params": params(max_new_tokens=40, sampling_seed=3)}
    text = generate(server, body).json()["text"]
    stop = text[len(text) // 2 :][:3]
    stopped = generate(server, {**body, "sampling_params": {**body["sampling_params"], "stop": stop}}).json()
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stopped["text"] == text[: text.index(stop)]
    assert requests.get(f"{server.url}/flush_cache?timeout=30", timeout=WAIT_S).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_scheduler_refuses_is_a_real_400(server: Server, stream: bool) -> None:
    answer = generate(server, {"text": "hi", "stream": stream, "sampling_params": {"max_new_tokens": 1 << 20}})
    assert answer.status_code == 400
    assert "maximum context length" in answer.json()["error"]["message"]


def test_hostile_bodies_are_refused_and_the_server_lives(server: Server) -> None:
    for body in (b"{", b"[" * 20_000, b'{"text":"\xff"}', b'{"input_ids":[1e400]}', b'{"text":"\\ud800"}'):
        answer = requests.post(f"{server.url}/generate", data=body, timeout=WAIT_S)
        assert answer.status_code == 400, body[:20]
    many = requests.post(f"{server.url}/generate", data=b"[" * 2_000_000, timeout=WAIT_S)
    assert many.status_code == 413 and "lists" in many.json()["error"]["message"]
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * (1 << 20) + b"\r\n\r\n")
        assert b"431" in raw.recv(64)
    assert requests.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200


def test_information_endpoints(server: Server) -> None:
    info = requests.get(f"{server.url}/server_info", timeout=WAIT_S).json()
    assert info["status"] == "ready"
    assert info["internal_states"][0]["ring"].keys() == {"tokenizer", "detokenizer", "gateway"}
    assert requests.get(f"{server.url}/health_generate", timeout=WAIT_S).status_code == 200
    assert "sglang:e2e_request_latency_seconds_bucket" in requests.get(f"{server.url}/metrics", timeout=WAIT_S).text
    [load] = requests.get(f"{server.url}/v1/loads", timeout=WAIT_S).json()["loads"]
    assert load["num_running_reqs"] + load["num_waiting_reqs"] == 0


def test_the_log_reads_as_operators_know_it(server: Server) -> None:
    server.wait_for("The server is fired up and ready to roll!")
    lines = server.log
    order = [
        "Started server process",
        "Uvicorn running on http://127.0.0.1",
        "/get_model_info",
        "POST /generate",
        "fired",
    ]
    assert sorted(order, key=lines.index) == order
    assert lines.count("The server is fired up and ready to roll!") == 1
    assert "] INFO:     127.0.0.1:" in lines
    assert "] INFO:     Started server process" in lines


def test_a_client_that_leaves_frees_its_place(slow: Server) -> None:
    with generate(slow, {"text": "hi", "stream": True, "sampling_params": params(max_new_tokens=1500)}, stream=True):
        pass  # the headers have come; leave
    assert requests.get(f"{slow.url}/flush_cache?timeout=30", timeout=WAIT_S).status_code == 200
    assert "disconnected from the client side" in slow.log


def test_abort_returns_what_there_is(slow: Server) -> None:
    found: list[Any] = []
    body = {"text": "hi", "rid": "r", "stream": True, "sampling_params": params(max_new_tokens=1500)}
    with generate(slow, body, stream=True) as answer:
        requests.post(f"{slow.url}/abort_request", json={"rid": "r"}, timeout=WAIT_S)
        found = events(answer)
    assert found[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert found[-1]["output_ids"]


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(slow_server: Callable[..., Server]) -> None:
    server = slow_server("--drain-timeout", "20")
    url, pool = server.url, requests.Session()
    pool.get(f"{url}/livez", timeout=WAIT_S)  # a connection from before
    body = {"text": "hi", "stream": True, "sampling_params": params(max_new_tokens=100)}
    with generate(server, body, stream=True) as answer:
        server.signal(signal.SIGTERM)
        server.wait_for("Draining")
        assert pool.get(f"{url}/readyz", timeout=WAIT_S).status_code == 503
        refused = pool.post(f"{url}/generate", json={"text": "hi"}, timeout=WAIT_S)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert events(answer)[-1]["meta_info"]["completion_tokens"] == 100
    assert server.wait() == 0


def test_the_drain_deadline_aborts_what_still_runs(slow_server: Callable[..., Server]) -> None:
    server = slow_server("--drain-timeout", "0.2")
    body = {"text": "hi", "stream": True, "sampling_params": params(max_new_tokens=1500)}
    with generate(server, body, stream=True) as answer:
        server.signal(signal.SIGTERM)
        assert events(answer)[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.wait() == 0


def test_a_warm_up_that_fails_ends_the_server_with_one_line(launch_fake: Callable[..., Server]) -> None:
    server = launch_fake("--preferred-sampling-params", '{"stop_regex": "("}', ready=False)
    assert server.wait() == 64
    assert "Initialization failed. warmup error" in server.output()


def test_many_clients_at_once_all_get_their_own_answers(server: Server) -> None:
    prompts = [[10 + i, 20 + i, 30 + i] for i in range(16)]
    alone = [
        generate(server, {"input_ids": ids, "sampling_params": params(max_new_tokens=12)}).json() for ids in prompts
    ]
    together: dict[int, Any] = {}

    def ask(i: int) -> None:
        together[i] = generate(server, {"input_ids": prompts[i], "sampling_params": params(max_new_tokens=12)}).json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lengths = [len(together[i]["output_ids"]) for i in range(len(prompts))]
    assert lengths == [len(answer["output_ids"]) for answer in alone]
    assert len({together[i]["meta_info"]["id"] for i in together}) == len(prompts)
