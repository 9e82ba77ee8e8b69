"""A server of a hybrid model: recurrent states live through deaths, swaps of memory and the prefix cache."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.model import tiny
from tests.ring.test_recovery import Stream
from tests.servers import Server, launched

WAIT_S = 120
LENGTH = 240
PROMPTS = [list(range(10 + i, 60 + 7 * i)) for i in range(4)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tiny.build("qwen3_5", tmp_path_factory.mktemp("hybrid") / "model")
    flags = ("--dtype", "float32", "--page-size", "4", "--enable-memory-saver", "--enable-deterministic-inference")
    with launched(
        "--model-path", str(directory), *flags, "--skip-tokenizer-init", "--max-total-tokens", "4096"
    ) as running:
        yield running


def body(ids: list[int], **params: Any) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": LENGTH, "ignore_eos": True, "temperature": 0, **params},
        "return_logprob": True,
    }


def ask(server: Server, ids: list[int], **params: Any) -> dict[str, Any]:
    reply = requests.post(f"{server.url}/generate", json=body(ids, **params), timeout=WAIT_S)
    assert reply.status_code == 200, reply.text
    said: dict[str, Any] = reply.json()
    return said


def test_death_of_the_scheduler_changes_no_bit_of_deterministic_answers(server: Server) -> None:
    undisturbed = [ask(server, ids)["meta_info"]["output_token_logprobs"] for ids in PROMPTS]
    streams = [Stream(server.url, body(ids)) for ids in PROMPTS]
    for stream in streams:
        stream.reach(20)
    server.children()["scheduler"].kill()
    found = []
    for stream in streams:
        stream.join(WAIT_S)
        assert stream.error is None and stream.made == LENGTH
        found.append(stream.events[-1]["meta_info"]["output_token_logprobs"])
    assert found == undisturbed


def test_follow_ups_find_their_prefix_and_memory_comes_back_after_a_release(server: Server) -> None:
    first = ask(server, PROMPTS[1])
    again = ask(server, PROMPTS[1])
    assert again["meta_info"]["cached_tokens"] == (len(PROMPTS[1]) - 1) // 4 * 4
    follow_up = [*PROMPTS[1], *first["output_ids"], 5]
    assert ask(server, follow_up, max_new_tokens=4)["meta_info"]["cached_tokens"] == 256
    for command in ("release_memory_occupation", "resume_memory_occupation"):
        reply = requests.post(f"{server.url}/{command}", json={"tags": ["kv_cache"]}, timeout=WAIT_S)
        assert reply.status_code == 200, reply.text
    last = ask(server, PROMPTS[1])
    assert last["meta_info"]["cached_tokens"] == 0
    assert last["output_ids"] == first["output_ids"] == again["output_ids"]
