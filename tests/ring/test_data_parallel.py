"""Two schedulers behind one gateway: who gets which request, what a death of one costs, and updates of both."""

import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from safetensors.torch import load_file, save_file

from tests.adapters import write_adapter
from tests.ring.test_recovery import BODIES, FLAGS, WAIT_S, Stream, assert_same
from tests.servers import ROOT, Server

DEMO = ROOT / "runtime" / "model_files" / "demo"
PROMPTS = [f"{number} is the number of this story, which is told at some length. " * 12 for number in range(4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo model, and one that is told apart from it by its weights."""
    place = tmp_path_factory.mktemp("models")
    first, second = (Path(shutil.copytree(DEMO, place / name)) for name in ("first", "second"))
    file = second / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1.5}, file)
    return [first, second]


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server], models: list[Path]) -> Server:
    flags = ("--model-path", str(models[0]), "--dp-size", "2", "--enable-metrics", "--enable-lora", *FLAGS)
    flags += ("--enable-memory-saver", "--enable-weights-cpu-backup", "--max-restarts", "100")
    return launch_for_module(*flags, standby=True)


def generate(server: Server, text: str, **fields: Any) -> dict[str, Any]:
    body = {"text": text, "sampling_params": {"max_new_tokens": 4, "temperature": 0}, **fields}
    answer = requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    meta: dict[str, Any] = answer.json()["meta_info"]
    return meta


def checksums(server: Server) -> set[str]:
    body = requests.post(f"{server.url}/weights_checker", json={"action": "checksum"}, timeout=WAIT_S).json()
    assert [entry["rank"] for entry in body["ranks"]] == [0, 1]
    return {str(entry["checksums"]) for entry in body["ranks"]}


def update(server: Server, model: Path, version: str, **fields: Any) -> requests.Response:
    body = {"model_path": str(model), "weight_version": version, **fields}
    return requests.post(f"{server.url}/update_weights_from_disk", json=body, timeout=WAIT_S)


def test_a_prompt_goes_where_its_beginning_was_computed_and_others_are_spread(server: Server) -> None:
    first = [generate(server, prompt) for prompt in PROMPTS]
    assert {meta["dp_rank"] for meta in first} == {0, 1}
    again = [generate(server, prompt + "And so on.") for prompt in PROMPTS]
    assert [meta["dp_rank"] for meta in again] == [meta["dp_rank"] for meta in first]
    assert all(meta["cached_tokens"] > 0.8 * meta["prompt_tokens"] for meta in again)


def test_the_client_may_choose_the_scheduler_through_every_api(server: Server) -> None:
    for rank in (0, 1):
        assert generate(server, PROMPTS[0], data_parallel_rank=rank)["dp_rank"] == rank
        body = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 1, "return_meta_info": True}
        for fields, headers in (({"data_parallel_rank": rank}, {}), ({}, {"X-Data-Parallel-Rank": str(rank)})):
            answer = requests.post(f"{server.url}/v1/completions", json=body | fields, headers=headers, timeout=WAIT_S)
            assert answer.json()["choices"][0]["meta_info"]["dp_rank"] == rank
    refused = requests.post(f"{server.url}/generate", json={"text": "a", "data_parallel_rank": 2}, timeout=WAIT_S)
    assert refused.status_code == 400
    assert "data_parallel_rank must be in 0..1, got 2" in refused.text


def test_load_and_metrics_are_told_by_rank(server: Server) -> None:
    load = requests.get(f"{server.url}/get_load", timeout=WAIT_S).json()
    assert [entry["dp_rank"] for entry in load] == [0, 1]
    one = requests.get(f"{server.url}/v1/loads?dp_rank=1", timeout=WAIT_S).json()["loads"]
    assert [entry["dp_rank"] for entry in one] == [1]
    metrics = requests.get(f"{server.url}/metrics", timeout=WAIT_S).text
    assert re.findall(r'^sglang:num_running_reqs\{dp_rank="(\d)"', metrics, re.M) == ["0", "1"]
    assert 'quartet:restarts_total{role="scheduler DP1"} 0.0' in metrics


def test_requests_of_a_dead_scheduler_go_on_elsewhere_before_it_is_back(server: Server) -> None:
    expected = [stream.answers() for stream in [Stream(server.url, body) for body in BODIES]]
    start = len(server.log)
    streams = [Stream(server.url, {**body, "data_parallel_rank": 1}) for body in BODIES]
    streams[0].reach(20)
    server.children()["scheduler DP1"].kill()
    assert_same([stream.answers() for stream in streams], expected)
    server.wait_for_match(r"The scheduler DP1 takes requests", start, WAIT_S)
    log = server.log[start:]
    assert log.index("requests are sent again") < log.index("takes requests")
    assert {event["meta_info"]["dp_rank"] for stream in streams for event in stream.events} == {0, 1}
    assert generate(server, PROMPTS[0], data_parallel_rank=1)["dp_rank"] == 1


def test_a_pause_and_released_memory_outlast_whoever_dies(server: Server) -> None:
    stream = Stream(server.url, {**BODIES[0], "data_parallel_rank": 1})
    stream.reach(5)
    assert post(server, "/pause_generation", {"mode": "retract"}).status_code == 200
    assert post(server, "/release_memory_occupation", {"tags": ["kv_cache"]}).status_code == 200
    made = stream.made
    for title, back in ((f"scheduler DP{rank}", f"The scheduler DP{rank} takes requests") for rank in (1, 0)):
        start = len(server.log)
        server.children()[title].kill()
        server.wait_for_match(back, start, WAIT_S)
    assert post(server, "/continue_generation", {}).status_code == 200
    assert "kv_cache" in requests.get(f"{server.url}/readyz", timeout=WAIT_S).text
    assert stream.made <= made + 1  # what was on its way
    assert post(server, "/resume_memory_occupation", {}).status_code == 200
    assert stream.answers()[0]["completion_tokens"] == 120


def test_a_pause_that_a_scheduler_takes_to_its_grave_is_made_up_for(server: Server) -> None:
    answers: list[requests.Response] = []
    start, victim = len(server.log), server.children()["scheduler DP1"]
    victim.suspend()
    pause = threading.Thread(target=lambda: answers.append(post(server, "/pause_generation", {"mode": "in_place"})))
    pause.start()
    wait_for(lambda: "paused" in requests.get(f"{server.url}/readyz", timeout=WAIT_S).text)
    victim.kill()
    pause.join(WAIT_S)
    assert answers[0].status_code == 503
    server.wait_for_match(r"The scheduler DP1 takes requests", start, WAIT_S)
    stream = Stream(server.url, {**BODIES[0], "data_parallel_rank": 1})
    wait_for(lambda: waiting(server) == [0, 1])
    assert post(server, "/continue_generation", {}).status_code == 200
    assert stream.answers()[0]["completion_tokens"] == 120


def waiting(server: Server) -> list[int]:
    """How many requests wait in each scheduler."""
    states = requests.get(f"{server.url}/get_server_info", timeout=WAIT_S).json()["internal_states"]
    return [state["num_queue_reqs"] for state in states]


def test_files_that_were_rewritten_before_a_first_death_are_served_by_nobody_until_an_update(
    server: Server, models: list[Path]
) -> None:
    place = Path(shutil.copytree(models[0], models[0].parent / "kept"))
    shutil.copyfile(models[1] / "model.safetensors", models[0] / "model.safetensors")
    start = len(server.log)
    server.children()["scheduler DP0"].kill()
    server.wait_for_match(r"The weights of scheduler DP0 were rewritten", start, WAIT_S)
    told = [generate(server, "Hello", data_parallel_rank=rank) for rank in (0, 1)]
    assert {(meta["dp_rank"], meta["weight_version"]) for meta in told} == {(1, "default")}
    assert left_out(server) == [0]
    shutil.copyfile(place / "model.safetensors", models[0] / "model.safetensors")
    assert update(server, models[0], "default", expected_version="default-rewritten").status_code == 409
    assert update(server, models[0], "default", expected_version="default").status_code == 200
    assert len(checksums(server)) == 1
    assert generate(server, "Hello", data_parallel_rank=0)["dp_rank"] == 0
    assert left_out(server) == []


def test_files_that_were_touched_before_all_died_are_served_and_may_get_their_version_again(
    server: Server, models: list[Path]
) -> None:
    before, start = checksums(server), len(server.log)
    (models[0] / "model.safetensors").touch()
    for rank in (0, 1):
        server.children()[f"scheduler DP{rank}"].kill()
    for rank in (0, 1):
        server.wait_for_match(f"The weights of scheduler DP{rank} were rewritten", start, WAIT_S)
    assert generate(server, "Hello")["weight_version"] == served_version(server) == "default-rewritten"
    assert left_out(server) == []
    assert post(server, "/update_weight_version", {"new_version": "default"}).status_code == 200
    for rank in (0, 1):
        server.wait_for_match(f"The scheduler DP{rank} takes requests", start, WAIT_S)
    assert generate(server, "Hello")["weight_version"] == served_version(server) == "default"
    assert checksums(server) == before


def served_version(server: Server) -> str:
    version: str = requests.get(f"{server.url}/model_info", timeout=WAIT_S).json()["weight_version"]
    return version


def left_out(server: Server) -> list[int]:
    found: list[int] = requests.get(f"{server.url}/get_server_info", timeout=WAIT_S).json()["left_out_dp_ranks"]
    return found


def test_an_update_reaches_both_or_none_and_no_stream_is_lost(server: Server, models: list[Path]) -> None:
    before = checksums(server)
    assert len(before) == 1
    streams = [Stream(server.url, body) for body in [BODIES[0], BODIES[1]] * 4]
    for stream in streams:
        stream.reach(5)
    broken = models[0].parent / "broken"
    assert update(server, broken, "broken").status_code == 400
    assert checksums(server) == before
    answer = update(server, models[1], "second")
    assert answer.status_code == 200, answer.text
    assert answer.json()["message"].count(" | ") == 1
    after = checksums(server)
    assert len(after) == 1
    assert after != before
    for stream in streams:
        assert stream.answers()[0]["completion_tokens"] == 120
    assert generate(server, "Hello", data_parallel_rank=1)["weight_version"] == "second"


def test_an_adapter_is_loaded_by_both_or_none(server: Server, models: list[Path]) -> None:
    place = models[0].parent
    assert load(server, place / "missing").status_code == 400
    assert load(server, write_adapter(models[0], place / "adapter")).status_code == 200
    assert len(adapted_texts(server)) == 1


def load(server: Server, path: Path) -> requests.Response:
    body = {"lora_name": "own", "lora_path": str(path)}
    return requests.post(f"{server.url}/load_lora_adapter", json=body, timeout=WAIT_S)


def adapted_texts(server: Server) -> set[str]:
    """What each scheduler says with the adapter."""
    body = {"text": "Hello", "lora_path": "own", "sampling_params": {"max_new_tokens": 16, "temperature": 0}}
    answers = [
        requests.post(f"{server.url}/generate", json={**body, "data_parallel_rank": rank}, timeout=WAIT_S).json()
        for rank in (0, 1)
    ]
    assert [answer["meta_info"]["dp_rank"] for answer in answers] == [0, 1]
    return {answer["text"] for answer in answers}


def test_a_scheduler_that_comes_back_serves_the_weights_and_adapters_of_the_others(server: Server) -> None:
    start, before = len(server.log), adapted_texts(server)
    server.children()["scheduler DP0"].kill()
    assert generate(server, "Hello", data_parallel_rank=0)["weight_version"] == "second"
    server.wait_for_match(r"The scheduler DP0 takes requests", start, WAIT_S)
    assert len(checksums(server)) == 1
    assert generate(server, "Hello", data_parallel_rank=0)["weight_version"] == "second"
    assert adapted_texts(server) == before
    answer = requests.post(f"{server.url}/unload_lora_adapter", json={"lora_name": "own"}, timeout=WAIT_S)
    assert answer.json()["loaded_adapters"] == {}


def test_a_request_ends_with_its_adapter_though_that_is_unloaded_and_its_scheduler_dies(
    server: Server, models: list[Path]
) -> None:
    assert load(server, models[0].parent / "adapter").status_code == 200
    body = {**BODIES[0], "lora_path": "own", "data_parallel_rank": 1}
    expected = Stream(server.url, body).answers()
    stream, start = Stream(server.url, body), len(server.log)
    stream.reach(5)
    assert post(server, "/pause_generation", {"mode": "in_place"}).status_code == 200
    assert post(server, "/unload_lora_adapter", {"lora_name": "own"}).json()["loaded_adapters"] == {}
    server.children()["scheduler DP1"].kill()
    server.wait_for_match(r"The scheduler DP1 takes requests", start, WAIT_S)
    assert post(server, "/continue_generation", {}).status_code == 200
    assert_same(stream.answers(), expected)
    late = post(server, "/generate", {"text": "Hello", "lora_path": "own"})
    assert late.status_code == 400 and "never been loaded" in late.text


def post(server: Server, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(f"{server.url}{path}", json=body, timeout=WAIT_S)


def test_a_scheduler_that_does_not_answer_is_named_and_the_others_are_told_of(server: Server) -> None:
    def silent() -> list[int]:
        body = requests.get(f"{server.url}/get_server_info", timeout=WAIT_S).json()
        assert len(body["internal_states"]) >= 1
        found: list[int] = body["unanswered_dp_ranks"]
        return found

    assert silent() == []
    stopped = server.children()["scheduler DP1"]
    stopped.suspend()
    try:
        wait_for(lambda: silent() == [1])
    finally:
        stopped.resume()
    wait_for(lambda: silent() == [])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_changes_that_are_on_no_disk_are_refused(server: Server) -> None:
    for path, body in (("/begin_weight_update", {}), ("/weights_checker", {"action": "reset_tensors"})):
        answer = requests.post(f"{server.url}{path}", json=body, timeout=WAIT_S)
        assert answer.status_code == 400
        assert "needs a server with one scheduler" in answer.text
