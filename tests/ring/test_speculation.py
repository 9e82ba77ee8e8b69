"""A server that speculates answers as one that does not, and tells what came of its drafts."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
import requests

from tests.servers import READY, Server

WAIT_S = 60
FLAGS = ("--dtype", "float32", "--page-size", "4", "--disable-standby", "--skip-server-warmup")
LIST = "one, two, three, four, five, six. " * 4
NUMBERS = {
    "type": "array",
    "items": {"type": "object", "properties": {"number": {"enum": ["one", "two"]}}, "required": ["number"]},
    "minItems": 9,
}
BODIES: list[dict[str, Any]] = [
    {"text": LIST, "sampling_params": {"temperature": 0, "max_new_tokens": 80, "ignore_eos": True}},
    {
        "text": LIST,
        "sampling_params": {"temperature": 0.4, "sampling_seed": 3, "max_new_tokens": 80, "ignore_eos": True},
    },
    {"text": LIST, "sampling_params": {"temperature": 0, "max_new_tokens": 80, "stop": ["e, f", "t t"]}},
    {
        "text": LIST,
        "sampling_params": {"temperature": 0.4, "sampling_seed": 5, "max_new_tokens": 60, "min_new_tokens": 40},
    },
    {"text": LIST, "sampling_params": {"temperature": 0, "max_new_tokens": 40, "frequency_penalty": 0.3}},
    {
        "text": LIST,
        "sampling_params": {"temperature": 0.8, "sampling_seed": 2, "max_new_tokens": 30, "regex": "[a-z ]+"},
    },
    {
        "text": LIST,
        "sampling_params": {"temperature": 0, "max_new_tokens": 60, "json_schema": json.dumps(NUMBERS)},
        "return_logprob": True,
    },
    {
        "text": LIST,
        "sampling_params": {"temperature": 0.4, "sampling_seed": 8, "max_new_tokens": 60, "regex": "(one, two[,.] )+"},
    },
    {
        "text": LIST,
        "sampling_params": {"temperature": 0, "max_new_tokens": 40},
        "return_logprob": True,
        "top_logprobs_num": 2,
        "logprob_start_len": 0,
    },
]


@pytest.fixture(scope="module")
def servers(launch_for_module: Callable[..., Server]) -> list[Server]:
    """Without and with drafts, started side by side."""
    ngram = ("--speculative-algorithm", "NGRAM", "--decode-log-interval", "4")
    both = [launch_for_module(*FLAGS, *flags, ready=False) for flags in ((), ngram)]
    for server in both:
        server.wait_for(READY)
    return both


@pytest.fixture
def plain(servers: list[Server]) -> Server:
    return servers[0]


@pytest.fixture
def drafting(servers: list[Server]) -> Server:
    return servers[1]


def events(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    with requests.post(
        f"{server.url}/generate", json={**body, "stream": True}, timeout=WAIT_S, stream=True
    ) as response:
        assert response.status_code == 200
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def told(answer: dict[str, Any]) -> dict[str, Any]:
    """What must not differ."""
    meta = answer["meta_info"]
    names = ("finish_reason", "prompt_tokens", "completion_tokens", "weight_versions")
    scores = [token for name in sorted(meta) if name.endswith("token_logprobs") for _, token, _ in meta[name]]
    return {
        "text": answer["text"],
        "ids": answer["output_ids"],
        "scored": scores,
        **{name: meta[name] for name in names},
    }


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body["sampling_params"]))
def test_streams_say_the_same_with_and_without_drafts(plain: Server, drafting: Server, body: dict[str, Any]) -> None:
    expected, found = events(plain, body), events(drafting, body)
    assert told(found[-1]) == told(expected[-1])
    assert all(later["text"].startswith(sooner["text"]) for sooner, later in itertools.pairwise(found))
    meta = found[-1]["meta_info"]
    histogram = meta["spec_correct_drafts_histogram"]
    assert sum(histogram) == meta["spec_verify_ct"]
    assert sum(right * steps for right, steps in enumerate(histogram)) == meta["spec_num_correct_drafts"]
    assert meta["completion_tokens"] == 1 + meta["spec_verify_ct"] + meta["spec_num_correct_drafts"]
    assert meta["spec_accept_length"] == pytest.approx(meta["completion_tokens"] / meta["spec_verify_ct"])
    assert not any(key.startswith("spec_") for key in expected[-1]["meta_info"])


def test_text_that_repeats_takes_fewer_steps_and_the_server_says_so(drafting: Server) -> None:
    found = events(drafting, BODIES[0])
    meta = found[-1]["meta_info"]
    assert meta["spec_accept_length"] > 1.3 and meta["spec_accept_rate"] > 0.2
    assert len(found) < 65
    info = requests.get(f"{drafting.url}/get_server_info", timeout=WAIT_S).json()
    assert (info["speculative_algorithm"], info["speculative_num_draft_tokens"]) == ("NGRAM", 8)
    assert info["internal_states"][0]["avg_spec_accept_length"] > 1
    assert "sglang:spec_accept_length{" in requests.get(f"{drafting.url}/metrics", timeout=WAIT_S).text
    assert "accept len: " in drafting.log


def test_the_openai_client_reads_the_same_stream(plain: Server, drafting: Server) -> None:
    def completion(server: Server) -> str:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        with client.completions.create(model="demo", prompt=LIST, max_tokens=60, temperature=0, stream=True) as stream:
            return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    assert completion(drafting) == completion(plain)
