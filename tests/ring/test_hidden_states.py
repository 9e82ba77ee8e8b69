"""Hidden states through a whole server: those of transformers, whole or streamed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import transformers

from tests.model import tiny
from tests.servers import Server

pytestmark = pytest.mark.slow

PROMPT = [(7 * i + 3) % 90 + 1 for i in range(40)]
NEW = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path, launch_for_module: Callable[..., Server]) -> Iterator[Server]:
    flags = ("--dtype", "float32", "--max-total-tokens", "4096", "--chunked-prefill-size", "16")
    yield launch_for_module("--model-path", str(model), *flags, "--enable-return-hidden-states")


def body(**fields: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
    return {"input_ids": PROMPT, "sampling_params": params, "return_hidden_states": True, **fields}


def rows_of(hidden_states: list[Any]) -> list[list[float]]:
    matrix, *vectors = hidden_states
    assert len(matrix) == len(PROMPT) and len(vectors) == NEW - 1  # nobody has read the last token
    return [*matrix, *vectors]


def test_they_are_those_of_transformers_also_when_the_prompt_is_cached(server: Server, model: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for _ in range(2):
        answer = requests.post(f"{server.url}/generate", json=body()).json()
        rows = rows_of(answer["meta_info"]["hidden_states"])
        with torch.no_grad():
            ids = torch.tensor([PROMPT + answer["output_ids"][:-1]])
            expected = reference.model(ids).last_hidden_state[0]
        torch.testing.assert_close(torch.tensor(rows), expected, rtol=1e-4, atol=1e-4)


def test_the_last_chunk_of_a_stream_has_all_of_them(server: Server) -> None:
    whole = requests.post(f"{server.url}/generate", json=body()).json()["meta_info"]["hidden_states"]
    with requests.post(f"{server.url}/generate", json=body(stream=True), stream=True) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith(b"data: {")]
    chunks = [json.loads(line)["meta_info"]["hidden_states"] for line in lines]
    assert all(len(chunk[0]) == len(PROMPT) for chunk in chunks)
    torch.testing.assert_close(torch.tensor(rows_of(chunks[-1])), torch.tensor(rows_of(whole)))


def test_each_prompt_of_a_batch_says_for_itself(server: Server) -> None:
    answers = requests.post(
        f"{server.url}/generate", json=body(input_ids=[PROMPT, PROMPT], return_hidden_states=[False, True])
    ).json()
    assert ["hidden_states" in answer["meta_info"] for answer in answers] == [False, True]
