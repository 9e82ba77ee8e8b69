"""KV beyond the pool on a whole server: evicted prefixes come back, after deaths and restarts too, never wrongly."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from deploy.benchmarks import half_billion
from tests import checkpoints
from tests.model import tiny
from tests.ring.test_tensor_parallel import follower
from tests.servers import Server

pytestmark = pytest.mark.slow

WAIT_S = 120
LENGTH, BLOCK = 300, 64
CACHED = LENGTH // BLOCK * BLOCK
PROMPTS = [[(11 * number + 3 * place * place) % 300 + 10 for place in range(LENGTH)] for number in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("models")
    made = [checkpoints.random_model(place / str(seed), seed) for seed in range(2)]
    for directory in made:
        half_billion.write_tokenizer(directory)
    return made


def flags(model: Path, directory: Path) -> tuple[str, ...]:
    """A pool of one prompt."""
    sizes = ("--max-total-tokens", "352", "--dtype", "float32", "--device", "cpu")
    return "--model-path", str(model), *sizes, "--kv-cache-dir", str(directory)


def post(server: Server, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=WAIT_S)


def ask(server: Server, number: int) -> tuple[list[int], int]:
    """The answer to a prompt, and how many of its tokens were cached."""
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    answer = post(server, "/generate", {"input_ids": PROMPTS[number], "sampling_params": params}).json()
    return answer["output_ids"], answer["meta_info"]["cached_tokens"]


def state(server: Server) -> dict[str, Any]:
    return requests.get(server.url + "/get_server_info", timeout=WAIT_S).json()["internal_states"][0]


def await_files(directory: Path, count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(list(directory.glob("*/*.kv"))) < count:
        assert time.monotonic() < deadline, list(directory.glob("*/*"))
        time.sleep(0.02)


def test_prefixes_come_back_after_eviction_deaths_and_restarts(
    launch: Callable[..., Server], models: list[Path], tmp_path: Path
) -> None:
    directory = tmp_path / "kv"
    server = launch(*flags(models[0], directory))
    answers = [ask(server, number) for number in range(3)]
    assert [cached for _, cached in answers] == [0, 0, 0]
    await_files(directory, 3 * (LENGTH // BLOCK))
    assert [ask(server, number) for number in range(3)] == [(ids, CACHED) for ids, _ in answers]
    counters = state(server)
    assert counters["kv_tier_restored_tokens_total"] == 3 * CACHED == counters["kv_tier_file_tokens"]
    metrics = requests.get(server.url + "/metrics", timeout=WAIT_S).text
    assert "sglang:kv_tier_restored_tokens_total{" in metrics and "sglang:kv_tier_file_bytes{" in metrics

    server.children()["scheduler"].kill()
    assert ask(server, 0) == (answers[0][0], CACHED), "another process reads the same files"

    second = launch(*flags(models[0], directory), ready=False)
    assert second.wait(WAIT_S) != 0
    assert "is in use by another server (process" in second.output()

    server.signal()
    server.wait()
    file = next(directory.glob("*/*.kv"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    server = launch(*flags(models[0], directory))
    again = [ask(server, number) for number in range(3)]
    assert [ids for ids, _ in again] == [ids for ids, _ in answers], "a damaged block is computed again"
    least, *others = sorted(cached for _, cached in again)
    assert least < CACHED and others == [CACHED, CACHED]
    assert server.log.count("is damaged or gone") == 1


def test_kv_of_other_weights_is_never_served(launch: Callable[..., Server], models: list[Path], tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    server = launch(*flags(models[0], directory))
    first = ask(server, 0)[0]
    await_files(directory, LENGTH // BLOCK)
    assert post(server, "/update_weights_from_disk", {"model_path": str(models[1])}).json()["success"]
    second, cached = ask(server, 0)
    assert cached == 0 and second != first
    server.children()["scheduler"].kill()
    assert ask(server, 0) == (second, 0), "the same weights, which were loaded by an update before"
    await_files(directory, LENGTH // BLOCK)
    assert post(server, "/flush_cache", {}).status_code == 200
    assert ask(server, 0) == (second, 0)
    server.signal()
    server.wait()
    server = launch(*flags(models[0], directory))
    assert ask(server, 0) == (first, 0)


def test_each_of_two_ranks_keeps_its_part(launch: Callable[..., Server], models: list[Path], tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    server = launch(*flags(models[0], directory), "--tp-size", "2")
    answers = [ask(server, number)[0] for number in range(2)]
    for place in (directory, directory / "rank1"):
        await_files(place, 2 * (LENGTH // BLOCK))
    assert ask(server, 0) == (answers[0], CACHED), "after an eviction"
    follower(server.children()["scheduler TP0"], "scheduler TP1").kill()
    assert ask(server, 1) == (answers[1], CACHED), "another group reads the same files"
    next((directory / "rank1").glob("*/*.kv")).unlink()
    server.signal()
    server.wait()
    server = launch(*flags(models[0], directory), "--tp-size", "2")
    again = [ask(server, number) for number in range(2)]
    assert [ids for ids, _ in again] == answers
    least, most = sorted(cached for _, cached in again)
    assert least < CACHED and most == CACHED, "a block of which one rank has no part is computed again by both"


@pytest.mark.parametrize(("ranks", "title"), [(1, "scheduler"), (2, "scheduler TP0")])
def test_recurrent_states_are_found_by_the_next_server(
    ranks: int, title: str, launch: Callable[..., Server], tmp_path: Path
) -> None:
    model, directory = tiny.build("qwen3_5", tmp_path / "model"), tmp_path / "kv"
    server = launch(*flags(model, directory), "--skip-tokenizer-init", "--tp-size", str(ranks))
    answer = ask(server, 0)[0]
    for place in (directory, directory / "rank1")[:ranks]:
        await_files(place, state(server)["kv_tier_stored_tokens_total"] // BLOCK)
    server.children()[title].kill()
    assert ask(server, 0) == (answer, CACHED)
