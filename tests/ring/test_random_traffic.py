"""The whole server under mixed traffic and little memory: every request gets its own, whole answer, and nothing stays.

The demo model runs on a KV pool so small that requests are retracted; clients stream, batch, abort and hang up.
"""

import itertools
import json
import random
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.servers import Server

pytestmark = pytest.mark.slow

CLIENTS = 16
CALLS = 80
WAIT_S = 120
PLACES = ["France", "Japan", "Kenya", "Peru", "Norway", "Egypt"]


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server]) -> Server:
    flags = ["--max-total-tokens", "256", "--page-size", "4", "--chunked-prefill-size", "32", "--dtype", "float32"]
    return launch_for_module(*flags)


def drawn_body(draw: random.Random) -> dict[str, Any]:
    """A request with an answer that depends on nothing but itself."""
    prompt = " ".join(f"The capital of {draw.choice(PLACES)} is known." for _ in range(draw.randint(1, 6)))
    params = {
        "max_new_tokens": draw.randint(20, 100),
        "ignore_eos": True,
        "temperature": draw.choice([0, 0.8]),
        "top_k": draw.choice([-1, 20]),
        "frequency_penalty": draw.choice([0, 0.5]),
        "sampling_seed": draw.randint(0, 1000),
    }
    body: dict[str, Any] = {"text": prompt, "sampling_params": params}
    if draw.random() < 0.3:
        body |= {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": draw.choice([-1, 0])}
    return body


def whole(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    response = requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The last event of a stream, which holds everything."""
    with requests.post(
        f"{server.url}/generate", json={**body, "stream": True}, timeout=WAIT_S, stream=True
    ) as response:
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines[-1] == b"[DONE]"
    texts = [json.loads(line)["text"] for line in lines[:-1]]
    assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(texts))
    return dict(json.loads(lines[-2]))


def hung_up(server: Server, body: dict[str, Any]) -> None:
    """Read one event of a long stream and leave."""
    body = {**body, "sampling_params": {**body["sampling_params"], "max_new_tokens": 150}, "stream": True}
    with requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S, stream=True) as response:
        next(response.iter_lines())


def aborted(server: Server, body: dict[str, Any]) -> None:
    """Start a long request, abort it by its rid, and get what there is."""
    rid = uuid.uuid4().hex
    body = {**body, "rid": rid, "sampling_params": {**body["sampling_params"], "max_new_tokens": 150}, "stream": True}
    with requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S, stream=True) as response:
        lines = response.iter_lines()
        next(lines)
        assert requests.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=WAIT_S).status_code == 200
        last = [line[6:] for line in lines if line][-2]
    assert json.loads(last)["meta_info"]["finish_reason"]["type"] == "abort"


def agree(answer: dict[str, Any], body: dict[str, Any]) -> None:
    """What must hold in every answer that ran to its end."""
    meta, asked = answer["meta_info"], body["sampling_params"]["max_new_tokens"]
    assert len(answer["output_ids"]) == meta["completion_tokens"] == asked
    assert meta["finish_reason"] == {"type": "length", "length": asked}
    if body.get("return_logprob"):
        assert [token for _, token, _ in meta["output_token_logprobs"]] == answer["output_ids"]
        assert len(meta["output_top_logprobs"]) == asked
        if body["logprob_start_len"] == 0:
            assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]


def test_mixed_traffic_leaves_every_answer_whole_and_nothing_behind(server: Server) -> None:
    draw = random.Random(7)
    bodies = [drawn_body(draw) for _ in range(CALLS)]
    ways = [draw.choice([whole, whole, streamed, streamed, hung_up, aborted]) for _ in bodies]
    with ThreadPoolExecutor(CLIENTS) as clients:
        together = list(clients.map(lambda way, body: way(server, body), ways, bodies))
    done = [(answer, body) for answer, body in zip(together, bodies, strict=True) if answer is not None]
    assert len(done) > CALLS // 3
    for answer, body in done:
        agree(answer, body)
    for answer, body in done[:20]:
        assert whole(server, body)["output_ids"] == answer["output_ids"], body
    assert requests.get(f"{server.url}/flush_cache?timeout=30", timeout=WAIT_S).status_code == 200
    load = requests.get(f"{server.url}/v1/loads", timeout=WAIT_S).json()["loads"][0]
    assert (load["num_reqs"], load["num_used_tokens"]) == (0, 0)
    counters = requests.get(f"{server.url}/get_server_info", timeout=WAIT_S).json()["internal_states"][0]
    assert counters["total_retracted_reqs"] > 0, "the pool was not small enough to try retraction"
    assert "do not balance" not in server.log
