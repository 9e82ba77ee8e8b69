"""Experts through a whole server: recorded by token and returned with requests.

Where that is off they are refused, and so are hidden states.
"""

import base64
import contextlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import requests
import torch
import transformers

from tests.model import tiny
from tests.servers import Server, launched

pytestmark = pytest.mark.slow

LAYERS, TOP_K = 2, 2
OFF = "Please set ServerArgs.expert_distribution_recorder_mode to use ExpertDistributionRecorder."
NO_HIDDEN_STATES = (
    "The server is not configured to return the hidden states. "
    "Please set `--enable-return-hidden-states` to enable this feature."
)
SAMPLING = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen2_moe", tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def serving(model: Path, *flags: str) -> Iterator[Server]:
    with launched("--model-path", str(model), "--dtype", "float32", "--max-total-tokens", "4096", *flags) as server:
        yield server


def generate(server: Server, ids: list[int], **fields: Any) -> dict[str, Any]:
    body = {"input_ids": ids, "sampling_params": SAMPLING, **fields}
    answer = requests.post(f"{server.url}/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def prompts() -> list[list[int]]:
    """Of several lengths, all with the same beginning."""
    rng = random.Random(1)
    start = [rng.randrange(3, tiny.VOCAB_SIZE) for _ in range(40)]
    return [start + [rng.randrange(3, tiny.VOCAB_SIZE) for _ in range(length)] for length in (1, 20, 50)]


@torch.inference_mode()
def choices(model: Path, ids: list[int]) -> list[Any]:
    """What transformers' routers choose: (tokens, layers, top_k), sorted."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    found = peer(torch.tensor([ids]), output_router_logits=True).router_logits
    return torch.stack([logits.topk(TOP_K).indices for logits in found], dim=1).sort().values.tolist()


def test_experts_of_every_token_are_returned_and_recorded(model: Path, tmp_path: Path) -> None:
    flags = "--enable-return-routed-experts --chunked-prefill-size 16 --expert-distribution-recorder-mode per_token"
    with serving(model, *flags.split(), "--expert-distribution-recorder-dir", str(tmp_path)) as server:
        generate(server, prompts()[0])  # leaves the common beginning in the cache
        requests.post(f"{server.url}/start_expert_distribution_record")
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda ids: generate(server, ids, return_routed_experts=True), prompts()))
        dumped = requests.get(f"{server.url}/dump_expert_distribution_record")
        tail = generate(server, prompts()[0], return_routed_experts=True, routed_experts_start_len=41)
    expected = [choices(model, ids + answer["output_ids"])[:-1] for ids, answer in zip(prompts(), answers, strict=True)]
    assert [routed(answer) for answer in answers] == expected
    assert routed(tail) == expected[0][41:]
    assert dumped.text == "Dump expert distribution record.\n"
    [path] = tmp_path.glob("*.pt")
    records = torch.load(path, weights_only=True)["records"]
    seen = torch.cat([record["topk_ids_of_layer"] for record in records], dim=1).transpose(0, 1)
    assert sorted(seen.sort().values.tolist()) == sorted(row for rows in expected for row in rows)


def routed(answer: dict[str, Any]) -> list[Any]:
    rows = base64.b64decode(answer["meta_info"]["routed_experts"])
    return numpy.sort(numpy.frombuffer(rows, dtype="<i4").reshape(-1, LAYERS, TOP_K)).tolist()


def test_a_server_without_the_flags_refuses_and_lives(model: Path) -> None:
    with serving(model) as server:
        for name in ("start", "stop", "dump"):
            for method in ("GET", "POST"):
                answer = requests.request(method, f"{server.url}/{name}_expert_distribution_record")
                assert (answer.status_code, answer.json()) == (400, {"error": {"message": OFF}})
        hidden = requests.post(f"{server.url}/generate", json={"text": "a", "return_hidden_states": True})
        assert (hidden.status_code, hidden.json()["error"]["message"]) == (400, NO_HIDDEN_STATES)
        refused = requests.post(f"{server.url}/generate", json={"text": "a", "return_routed_experts": True})
        assert refused.status_code == 400 and "--enable-return-routed-experts" in refused.json()["error"]["message"]
        assert generate(server, prompts()[0])["meta_info"]["completion_tokens"] == 12
