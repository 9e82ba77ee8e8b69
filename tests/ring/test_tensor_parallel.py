"""One model computed by two ranks: answers, weights that change, what is refused, the death of either rank."""

import base64
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from safetensors.torch import save

from quartet.runtime.model_files.model_info import DEMO
from quartet.scheduler_service.weights.inspection import digest_of
from tests import checkpoints
from tests.ring.test_recovery import BODIES, FLAGS, Stream, assert_same, wait_for_return
from tests.servers import Server, command_line, launched

WAIT_S = 60
FIRST = 100  # version v answers token FIRST + v
STREAMS, UPDATES, TOKENS = 8, 6, 100
PROMPT = list(range(10, 42))
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with launched("--model-path", "demo", "--tp-size", "2", "--device", "cpu", *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [version(tmp_path_factory.mktemp("version"), FIRST + number) for number in range(2)]


def version(directory: Path, token: int) -> Path:
    """Weights of the demo model's shapes that answer `token`, always."""
    shutil.copy(DEMO / "config.json", directory)
    tensors = checkpoints.shapes(directory)
    values = {name: torch.full(shape, float("norm" in name)) for name, shape in tensors.items()}
    return checkpoints.save(directory, values | {EMBEDDINGS: embeddings(token)})


def embeddings(token: int) -> torch.Tensor:
    values = torch.ones(2048, 256)
    values[token] = 2.0
    return values


def rank(server: Server, number: int) -> psutil.Process:
    """The process of a rank; those after the first are children of the first."""
    first = server.children()["scheduler TP0"]
    if not number:
        return first
    return next(child for child in first.children() if command_line(child)[:1] == [f"quartet::scheduler TP{number}"])


def post(server: Server, route: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(f"{server.url}/{route}", json=body, timeout=WAIT_S)


def generate(server: Server, tokens: int) -> Any:
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return post(server, "generate", {"input_ids": PROMPT, "sampling_params": params}).json()


def from_tensors(server: Server, *payloads: bytes, **fields: Any) -> requests.Response:
    entries = [base64.b64encode(payload).decode() for payload in payloads]
    return post(server, "update_weights_from_tensor", {"serialized_named_tensors": entries, **fields})


def test_the_start_says_how_the_ranks_have_met(server: Server) -> None:
    assert server.log.count("Init torch distributed begin.") == 2
    assert "Init torch distributed ends. rank=1 of 2" in server.log
    assert requests.get(f"{server.url}/get_server_info", timeout=WAIT_S).json()["tp_size"] == 2


def test_all_ranks_take_new_weights_at_the_same_step(server: Server, versions: list[Path]) -> None:
    post(server, "update_weights_from_disk", {"model_path": str(versions[0]), "weight_version": "0"})
    answers: list[dict[str, Any]] = []
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            answers.append(generate(server, TOKENS))

    clients = [threading.Thread(target=client) for _ in range(STREAMS)]
    for thread in clients:
        thread.start()
    for number in range(1, UPDATES + 1):
        fields = {"model_path": str(versions[number % 2]), "weight_version": str(number)}
        answer = post(server, "update_weights_from_disk", fields)
        assert answer.json()["success"], answer.text
    done.set()
    for thread in clients:
        thread.join()
    assert len(answers) >= STREAMS
    for answer in answers:
        made = []
        for span in answer["meta_info"]["weight_versions"]:
            made += [FIRST + int(span["version"]) % 2] * (span["end"] - span["start"])
        assert answer["output_ids"] == made and len(made) == TOKENS
    assert max(len(answer["meta_info"]["weight_versions"]) for answer in answers) > 1


def test_checksums_are_those_of_whole_tensors_on_every_rank(server: Server, versions: list[Path]) -> None:
    assert post(server, "update_weights_from_disk", {"model_path": str(versions[1])}).status_code == 200
    found = post(server, "weights_checker", {"action": "checksum"}).json()
    weights = checkpoints.loaded(versions[1])
    expected = {name: weights.checksum(name) for name in weights.names()}
    assert [one["checksums"] for one in found["ranks"]] == [expected, expected]
    assert found["per_engine_checksum"] == digest_of(expected)
    rows = post(server, "get_weights_by_name", {"name": "model.layers.0.mlp.down_proj.weight", "truncate_size": 1})
    assert len(rows.json()[0]) == 640


def test_tensors_in_the_body_are_taken_by_all_ranks_or_by_none(server: Server) -> None:
    good = save({EMBEDDINGS: embeddings(FIRST + 7)})
    assert from_tensors(server, good, good).json()["success"]
    assert generate(server, 2)["output_ids"] == [FIRST + 7] * 2
    other = save({EMBEDDINGS: embeddings(FIRST + 8)})
    broken = save({EMBEDDINGS: embeddings(FIRST + 8).fill_(torch.nan)})
    refused = from_tensors(server, other, broken)  # rank 0 could take its part
    assert refused.status_code == 400 and "(rank 1)" in refused.json()["message"], refused.text
    assert "one entry for each of 2 ranks, got 1" in from_tensors(server, other).text
    assert generate(server, 2)["output_ids"] == [FIRST + 7] * 2
    assert from_tensors(server, other, other).json()["success"]
    assert generate(server, 2)["output_ids"] == [FIRST + 8] * 2


def test_commands_that_only_one_process_can_follow_are_refused(server: Server) -> None:
    group = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 3, "group_name": "g"}
    for route, body in [
        ("release_memory_occupation", {}),
        ("weights_checker", {"action": "reset_tensors"}),
        ("init_weights_update_group", {**group, "backend": "gloo"}),
    ]:
        answer = post(server, route, body)
        assert answer.status_code == 400, (route, answer.text)
    assert post(server, "flush_cache", {}).status_code == 200


def test_streams_go_on_when_either_rank_is_killed(server: Server) -> None:
    assert post(server, "update_weights_from_disk", {"model_path": "demo"}).status_code == 200
    before = [stream.answers() for stream in [Stream(server.url, body) for body in BODIES]]
    for count, number in enumerate((1, 0), 1):
        streams = [Stream(server.url, body) for body in BODIES]
        streams[0].reach(20)
        rank(server, number).kill()
        wait_for_return(server, "scheduler", count)
        assert_same([stream.answers() for stream in streams], before)
    assert requests.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200
    assert server.log.count("Ending the group.") >= 1
