"""Whole servers of two ranks beside one of one process: models with a second table of embeddings, and an embedder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.model import tiny
from tests.model.cases import VOCAB_SIZE
from tests.servers import Server, launched

WAIT_S = 60
FLAGS = ("--dtype", "float32", "--page-size", "4", "--device", "cpu")
PROMPTS = [
    [3 + (7 * place + 5 * number) % (VOCAB_SIZE - 3) for place in range(20 + 30 * number)] for number in range(3)
]
TEXTS = ["The capital of Kenya", "Once upon a time there was a fox", "a"]


@contextmanager
def both(directory: Path, *flags: str) -> Iterator[tuple[Server, Server]]:
    """The model in one process, and divided among two."""
    own = ("--model-path", str(directory), *FLAGS, *flags)
    with launched(*own) as whole, launched(*own, "--tp-size", "2") as divided:
        assert {"scheduler TP0"} <= set(divided.children())
        yield whole, divided


def post(server: Server, route: str, body: dict[str, Any]) -> Any:
    answer = requests.post(f"{server.url}/{route}", json=body, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    return answer.json()


def generated(server: Server) -> tuple[list[list[int]], list[float]]:
    """The greedy tokens of a batch, and of the same again from the prefix cache; the logprobs of all."""
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    body = {"input_ids": PROMPTS, "sampling_params": params, "return_logprob": True}
    answers = [*post(server, "generate", body), *post(server, "generate", body)]
    assert [answer["meta_info"]["cached_tokens"] > 0 for answer in answers] == [False] * 3 + [True] * 3
    scores = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    return [answer["output_ids"] for answer in answers], [score[0] for some in scores for score in some]


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_two_ranks_generate_what_one_process_does(family: str, tmp_path: Path) -> None:
    with both(tiny.build(family, tmp_path)) as (whole, divided):
        (tokens, scores), (found, their_scores) = generated(whole), generated(divided)
        assert found == tokens
        assert their_scores == pytest.approx(scores, abs=1e-3)
        assert len({tuple(ids) for ids in tokens}) == len(PROMPTS)


def test_two_ranks_embed_as_one_process_does(tmp_path: Path) -> None:
    with both(tiny.build("qwen3", tmp_path), "--is-embedding") as (whole, divided):
        for route, body, name in (("encode", {"text": TEXTS}, None), ("v1/embeddings", {"input": TEXTS}, "data")):
            ours, theirs = (post(server, route, body) for server in (whole, divided))
            ours, theirs = (ours, theirs) if name is None else (ours[name], theirs[name])
            vectors = [entry["embedding"] for entry in ours]
            for entry, vector in zip(theirs, vectors, strict=True):
                assert entry["embedding"] == pytest.approx(vector, abs=1e-5)
            assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)
