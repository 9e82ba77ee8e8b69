"""The calls of RL trainers, in their order and with their bodies, against a whole server with a tiny model."""

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import save

from tests import checkpoints
from tests.servers import Server

pytestmark = pytest.mark.slow

WAIT_S = 60
FIRST = 40
PROMPT = list(range(10, 42))
PAUSED = {"message": "Generation paused successfully.", "status": "ok"}
CONTINUED = {"message": "Generation continued successfully.", "status": "ok"}


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("versions")
    return [checkpoints.version_model(place / str(v), FIRST + v) for v in range(2)]


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server], versions: list[Path]) -> Server:
    flags = ("--skip-tokenizer-init", "--enable-memory-saver", "--max-total-tokens", "16384", "--device", "cpu")
    return launch_for_module("--model-path", str(versions[0]), *flags)


@pytest.fixture
def post(server: Server, versions: list[Path]) -> Iterator[Callable[..., Any]]:
    """POST to the server; version 0 serves at the begin, and nothing is paused."""

    def call(path: str, body: Any = None, status: int = 200) -> Any:
        answer = requests.post(server.url + path, json=body, timeout=WAIT_S)
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        return answer.json() if answer.content else None

    call("/update_weights_from_disk", {"model_path": str(versions[0]), "weight_version": "0"})
    yield call
    call("/slow_down", {"forward_sleep_time": None})
    call("/continue_generation")


@pytest.fixture
def get(server: Server) -> Callable[..., requests.Response]:
    return lambda path: requests.get(server.url + path, timeout=WAIT_S)


class Rollout:
    """A /generate that is under way in a thread."""

    def __init__(self, post: Callable[..., Any], rid: str, tokens: int) -> None:
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        self.answer: Any = None
        body = {"rid": rid, "input_ids": PROMPT, "sampling_params": params, "return_logprob": True}
        self._thread = threading.Thread(target=lambda: setattr(self, "answer", post("/generate", body)))
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(WAIT_S)
        assert self.answer is not None
        return self.answer

    @property
    def running(self) -> bool:
        return self._thread.is_alive()


@contextmanager
def rollouts(
    post: Callable[..., Any], get: Callable[..., Any], *rids: str, tokens: int = 60
) -> Iterator[list[Rollout]]:
    """Slow requests that are certainly running inside."""
    post("/slow_down", {"forward_sleep_time": 0.02})
    started = [Rollout(post, rid, tokens) for rid in rids]
    wait_until(lambda: running(get) == len(rids))
    yield started
    for rollout in started:
        rollout.result()


def running(get: Callable[..., Any]) -> int:
    load = get("/v1/loads?include=core").json()["loads"][0]
    return int(load["num_running_reqs"] + load["num_waiting_reqs"])


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline


def bucket(token: int) -> list[str]:
    values = torch.zeros(checkpoints.VOCAB_SIZE, 64)
    values[token] = 1.0
    return [base64.b64encode(save({"lm_head.weight": values})).decode()]


def spans(answer: Any) -> list[tuple[str, set[int]]]:
    """(version, tokens) of an answer's spans, which must cover it."""
    found = answer["meta_info"]["weight_versions"]
    assert [span["end"] for span in found[:-1]] == [span["start"] for span in found[1:]]
    assert (found[0]["start"], found[-1]["end"]) == (0, len(answer["output_ids"]))
    return [(span["version"], set(answer["output_ids"][span["start"] : span["end"]])) for span in found]


def test_slime_pauses_flushes_and_sends_buckets(post: Callable[..., Any], get: Callable[..., Any]) -> None:
    assert get("/health_generate").status_code == 200
    with rollouts(post, get, "s0", "s1") as started:
        assert post("/pause_generation", {}) == PAUSED
        for rollout in started:  # the default mode ends them with what they have
            meta = rollout.result()["meta_info"]
            assert meta["finish_reason"]["type"] == "abort"
            assert len(meta["output_token_logprobs"]) == meta["completion_tokens"] > 0
        assert get("/flush_cache").status_code == 200
        body = {"serialized_named_tensors": bucket(FIRST + 2), "load_format": None, "flush_cache": False}
        assert post("/update_weights_from_tensor", {**body, "weight_version": "2"})["success"]
        assert get("/flush_cache").status_code == 200
        assert post("/continue_generation", {}) == CONTINUED
    assert get("/get_weight_version").json() == {"weight_version": "2"}
    assert spans(Rollout(post, "s2", 3).result()) == [("2", {FIRST + 2})]
    assert post("/weights_checker", {"action": "snapshot"})["success"]
    assert post("/weights_checker", {"action": "compare"})["success"]
    assert post("/abort_request", {"abort_all": True}) is None
    wait_until(lambda: running(get) == 0)


def test_slime_releases_memory_for_the_training_step(
    post: Callable[..., Any], get: Callable[..., Any], versions: list[Path]
) -> None:
    assert get("/flush_cache").status_code == 200
    assert post("/release_memory_occupation", {}) is None
    assert get("/health_generate").status_code == 200
    assert get("/readyz").status_code == 503
    assert post("/resume_memory_occupation", {"tags": ["weights"]}) is None
    assert post("/update_weights_from_disk", {"model_path": str(versions[1]), "weight_version": "1"})["success"]
    assert post("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]}) is None
    assert get("/readyz").status_code == 200
    assert spans(Rollout(post, "m", 3).result()) == [("1", {FIRST + 1})]


def test_miles_retracts_updates_in_a_bracket_and_loses_nothing(
    post: Callable[..., Any], get: Callable[..., Any]
) -> None:
    with rollouts(post, get, "m0", "m1") as started:
        assert post("/pause_generation", {"mode": "retract"}) == PAUSED
        assert post("/pause_generation", {"mode": "retract"}) == PAUSED
        assert get("/health").status_code == get("/health_generate").status_code == 200
        assert get("/flush_cache").status_code == 200
        assert post("/begin_weight_update", {"selector": "all"})["success"]
        body = {"serialized_named_tensors": bucket(FIRST + 3), "flush_cache": False, "selector": "all"}
        assert post("/update_weights_from_tensor", body)["success"]
        assert post("/end_weight_update", {})["success"]
        renamed = post("/update_weight_version", {"new_version": "3", "abort_all_requests": False})
        assert renamed == {
            "success": True,
            "message": "Weight version updated to 3",
            "new_version": "3",
            "num_aborted_requests": 0,
        }
        late = Rollout(post, "m2", 2)
        assert post("/continue_generation", {"torch_empty_cache": True}) == CONTINUED
        answers = [rollout.result() for rollout in started]
    assert all(spans(answer) == [("0", {FIRST}), ("3", {FIRST + 3})] for answer in answers)
    assert all(len(answer["output_ids"]) == 60 for answer in answers)
    assert spans(late.result()) == [("3", {FIRST + 3})]
    assert get("/model_info").json()["weight_version"] == "3"


def test_miles_aborts_by_prefix(post: Callable[..., Any], get: Callable[..., Any]) -> None:
    with rollouts(post, get, "group-1-a", "group-1-b", "group-2", tokens=40) as started:
        post("/abort_request", {"rid": "group-1", "prefix": True})
        ends = [rollout.result()["meta_info"]["finish_reason"]["type"] for rollout in started]
    assert ends == ["abort", "abort", "length"]


def test_areal_updates_from_disk_and_aborts_what_runs(
    post: Callable[..., Any], get: Callable[..., Any], versions: list[Path]
) -> None:
    assert get("/health").status_code == 200
    with rollouts(post, get, "a0") as started:
        answer = post("/update_weights_from_disk", {"model_path": str(versions[1]), "abort_all_requests": True})
        assert answer == {
            "success": True,
            "message": "Succeeded to update model weights.",
            "num_paused_requests": 0,
        }
        assert started[0].result()["meta_info"]["finish_reason"]["type"] == "abort"
    group = {"master_address": "127.0.0.1", "master_port": "0", "rank_offset": 1, "world_size": 2, "pp_rank": 0}
    refused = post("/init_weights_update_group", {**group, "group_name": "g", "backend": "gloo"}, status=400)
    assert "master_port 0 is no port" in refused["message"]  # read as a number; extra keys do not matter


def test_areal_pauses_around_an_update_in_place(
    post: Callable[..., Any], get: Callable[..., Any], versions: list[Path]
) -> None:
    with rollouts(post, get, "i0", "i1") as started:
        assert post("/pause_generation", {"mode": "in_place"}) == PAUSED
        body = {"model_path": str(versions[1]), "weight_version": "1", "is_async": False, "token_step": 3}
        assert post("/update_weights_from_disk", body)["num_paused_requests"] == 2
        assert all(rollout.running for rollout in started)
        assert get("/ready").status_code == 503
        assert post("/continue_generation") == CONTINUED
    assert all(spans(rollout.result()) == [("0", {FIRST}), ("1", {FIRST + 1})] for rollout in started)


def test_verl_sleeps_and_wakes(post: Callable[..., Any], get: Callable[..., Any]) -> None:
    assert get("/flush_cache").status_code == 200
    assert post("/release_memory_occupation", {"tags": ["kv_cache"]}) is None
    assert post("/release_memory_occupation", {"tags": ["kv_cache"]}) is None
    body = {"serialized_named_tensors": bucket(FIRST + 5), "load_format": "direct", "flush_cache": True}
    assert post("/update_weights_from_tensor", body)["success"]
    assert post("/resume_memory_occupation", {"tags": ["kv_cache"]}) is None
    assert Rollout(post, "v", 3).result()["output_ids"] == [FIRST + 5] * 3
    assert post("/abort_request", {"rid": "nobody", "abort_all": False}) is None


def test_a_label_change_aborts_by_default_and_counts(post: Callable[..., Any], get: Callable[..., Any]) -> None:
    with rollouts(post, get, "l0", "l1") as started:
        answer = post("/update_weight_version", {"new_version": "renamed"})
        assert (answer["new_version"], answer["num_aborted_requests"]) == ("renamed", 2)
        assert [r.result()["meta_info"]["finish_reason"]["type"] for r in started] == ["abort", "abort"]
    assert get("/weight_version").json() == {"weight_version": "renamed"}


def test_control_answers_have_the_contracts_bodies(post: Callable[..., Any], get: Callable[..., Any]) -> None:
    checked = get("/weights_checker?action=checksum").json()
    assert checked["success"] and len(checked["per_engine_checksum"]) == 16
    assert set(checked["ranks"][0]["checksums"]) > {"lm_head.weight"}
    assert get("/get_weights_by_name?name=model.norm.weight&truncate_size=3").json() == [1.0, 1.0, 1.0]
    unknown = post("/get_weights_by_name", {"name": "no.such"}, status=400)
    assert unknown == {"error": {"message": "Get parameter by name failed"}}
    assert get("/freeze_gc").text == "Garbage collection frozen.\n"
    missing = post("/destroy_weights_update_group", {"group_name": "none"}, status=400)
    assert missing == {"success": False, "message": "The group to be destroyed does not exist."}
    post("/pause_generation", {"mode": "sideways"}, status=400)


def test_racing_pauses_and_continues_leave_a_consistent_server(
    post: Callable[..., Any], get: Callable[..., Any]
) -> None:
    def race(number: int) -> None:
        for _ in range(5):
            post("/pause_generation", {"mode": ["retract", "in_place"][number % 2]})
            post("/continue_generation")

    with rollouts(post, get, "race", tokens=30) as started:
        clients = [threading.Thread(target=race, args=(number,)) for number in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        post("/continue_generation")
        assert started[0].result()["output_ids"] == [FIRST] * 30
