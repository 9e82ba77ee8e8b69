"""One model computed by two ranks: answers, weights that change, what is refused, the death of either rank."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from safetensors.torch import load_file, save

from quartet.runtime.model_files.model_info import DEMO
from quartet.scheduler_service.weights.inspection import digest_of
from quartet.scheduler_service.weights.manifest import manifest_of
from tests import checkpoints
from tests.adapters import write_adapter
from tests.ring.test_recovery import BODIES, FLAGS, MANY, RETURNED, Stream, assert_same, wait_for_return
from tests.servers import Server, command_line, launched
from tests.unit.scheduler_service.control.test_process_groups import GROUP, trainer

WAIT_S = 60
FIRST = 100  # version v answers token FIRST + v
STREAMS, UPDATES, TOKENS = 8, 6, 100
PROMPT = list(range(10, 42))
ADAPTED = {**BODIES[0], "lora_path": "a"}
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    own = ("--enable-memory-saver", "--enable-lora")
    with launched("--model-path", "demo", "--tp-size", "2", "--device", "cpu", *own, *FLAGS) as server:
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
    return follower(first, f"scheduler TP{number}")


def follower(first: psutil.Process, title: str) -> psutil.Process:
    """The rank of that title, which rank 0 has started."""
    return next(child for child in first.children() if command_line(child)[:1] == [f"quartet::{title}"])


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


def test_a_manifest_is_checked_before_any_rank_takes_the_weights(server: Server, versions: list[Path]) -> None:
    digests = manifest_of(versions[0])
    body = {"model_path": str(versions[0]), "manifest": digests}
    assert post(server, "update_weights_from_disk", body).json()["success"]
    assert generate(server, 2)["output_ids"] == [FIRST] * 2
    for name in digests:
        wrong = {"model_path": str(versions[1]), "manifest": manifest_of(versions[1]) | {name: "0" * 16}}
        refused = post(server, "update_weights_from_disk", wrong)
        assert refused.status_code == 400 and f"tensor {name} hashes to" in refused.text
    assert generate(server, 2)["output_ids"] == [FIRST] * 2


def test_all_ranks_draw_the_same_random_weights(server: Server, versions: list[Path]) -> None:
    assert post(server, "weights_checker", {"action": "snapshot"}).status_code == 200
    assert post(server, "weights_checker", {"action": "reset_tensors"}).status_code == 200
    assert "differ from the snapshot in" in post(server, "weights_checker", {"action": "compare"}).text
    found = post(server, "weights_checker", {"action": "checksum"})  # copies that differ would be an error
    assert found.status_code == 200 and found.json()["per_engine_checksum"]
    assert post(server, "update_weights_from_disk", {"model_path": str(versions[0])}).json()["success"]
    assert generate(server, 2)["output_ids"] == [FIRST] * 2


def test_memory_is_given_back_by_all_ranks_and_taken_again(server: Server, versions: list[Path]) -> None:
    assert post(server, "release_memory_occupation", {}).status_code == 200
    assert "The memory of the weights is released" in post(server, "get_weights_by_name", {"name": EMBEDDINGS}).text
    assert post(server, "resume_memory_occupation", {}).status_code == 200
    assert post(server, "update_weights_from_disk", {"model_path": str(versions[1])}).json()["success"]
    assert generate(server, 5)["output_ids"] == [FIRST + 1] * 5


def test_all_ranks_receive_what_a_trainer_broadcasts(server: Server, tmp_path: Path) -> None:
    (tmp_path / "sent.safetensors").write_bytes(save({EMBEDDINGS: embeddings(FIRST + 9)}))
    too_small = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    refused = post(server, "init_weights_update_group", {**too_small, "group_name": GROUP, "backend": "gloo"})
    assert refused.status_code == 400 and "ranks 1 to 2 of 2" in refused.text
    with trainer(tmp_path / "sent.safetensors", world_size=3) as sending, ThreadPoolExecutor() as pool:
        group = {**too_small, "master_port": sending.port, "world_size": 3, "group_name": GROUP, "backend": "gloo"}
        joined = pool.submit(post, server, "init_weights_update_group", group)
        assert sending.read_line() == "joined" and joined.result().json()["success"], joined.result().text
        names = {"names": [EMBEDDINGS], "dtypes": ["float32"], "shapes": [[2048, 256]], "group_name": GROUP}
        taken = pool.submit(post, server, "update_weights_from_distributed", names)
        sending.go()
        assert taken.result().json()["success"], taken.result().text
        assert generate(server, 2)["output_ids"] == [FIRST + 9] * 2
        assert post(server, "destroy_weights_update_group", {"group_name": GROUP}).json()["success"]
    checksums = post(server, "weights_checker", {"action": "checksum"}).json()["ranks"]
    assert checksums[0]["checksums"] == checksums[1]["checksums"]


def adapted_ids(server: Server) -> Any:
    """What the adapter a answers."""
    return Stream(server.url, ADAPTED).answers()[0]["ids"]


def test_an_adapter_in_the_body_comes_once_or_once_for_each_rank(server: Server, tmp_path: Path) -> None:
    place = write_adapter(DEMO, tmp_path / "adapter", seed=3)
    assert post(server, "load_lora_adapter", {"lora_name": "a", "lora_path": str(place)}).status_code == 200
    expected = adapted_ids(server)
    config = json.loads((place / "adapter_config.json").read_text())
    sent = base64.b64encode((place / "adapter_model.safetensors").read_bytes()).decode()
    for copies in (1, 2):
        assert post(server, "unload_lora_adapter", {"lora_name": "a"}).status_code == 200
        body = {"lora_name": "a", "config_dict": config, "serialized_named_tensors": [sent] * copies}
        loaded = post(server, "load_lora_adapter_from_tensors", body)
        assert loaded.status_code == 200, loaded.text
        assert adapted_ids(server) == expected
    assert post(server, "unload_lora_adapter", {"lora_name": "a"}).status_code == 200


def test_all_ranks_receive_an_adapter_that_a_trainer_broadcasts(server: Server, tmp_path: Path) -> None:
    place = write_adapter(DEMO, tmp_path / "adapter", seed=3)
    assert post(server, "load_lora_adapter", {"lora_name": "a", "lora_path": str(place)}).status_code == 200
    expected = adapted_ids(server)
    assert post(server, "unload_lora_adapter", {"lora_name": "a"}).status_code == 200
    tensors = sorted(load_file(place / "adapter_model.safetensors").items())
    with trainer(place / "adapter_model.safetensors", world_size=3) as sending, ThreadPoolExecutor() as pool:
        group = {"master_address": "127.0.0.1", "master_port": sending.port, "rank_offset": 1, "world_size": 3}
        joined = pool.submit(
            post, server, "init_weights_update_group", {**group, "group_name": GROUP, "backend": "gloo"}
        )
        assert sending.read_line() == "joined" and joined.result().json()["success"], joined.result().text
        body = {
            "lora_name": "a",
            "config_dict": json.loads((place / "adapter_config.json").read_text()),
            "names": [name for name, _ in tensors],
            "dtypes": ["float32"] * len(tensors),
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": GROUP,
        }
        refused = post(server, "load_lora_adapter_from_distributed", {**body, "names": ["x"] * len(tensors)})
        assert refused.status_code == 400 and "not a factor" in refused.text
        taken = pool.submit(post, server, "load_lora_adapter_from_distributed", body)
        sending.go()
        assert taken.result().status_code == 200, taken.result().text
        assert post(server, "destroy_weights_update_group", {"group_name": GROUP}).json()["success"]
    assert adapted_ids(server) == expected
    assert post(server, "unload_lora_adapter", {"lora_name": "a"}).status_code == 200


def test_adapters_are_loaded_by_all_ranks_and_outlive_the_group(server: Server, tmp_path: Path) -> None:
    assert post(server, "update_weights_from_disk", {"model_path": "demo"}).json()["success"]
    place = write_adapter(DEMO, tmp_path / "adapter", seed=3)
    assert post(server, "load_lora_adapter", {"lora_name": "a", "lora_path": str(place)}).status_code == 200
    refused = post(server, "load_lora_adapter", {"lora_name": "b", "lora_path": str(tmp_path)})
    assert refused.status_code == 400 and "adapter_config.json" in refused.text
    base, adapted = [Stream(server.url, body).answers() for body in (BODIES[0], ADAPTED)]
    assert base[0]["ids"] != adapted[0]["ids"]
    streams = [Stream(server.url, body) for body in (BODIES[0], ADAPTED)]
    streams[1].reach(20)
    before = server.log.count(RETURNED.format("scheduler"))
    rank(server, 1).kill()
    wait_for_return(server, "scheduler", before + 1)
    assert_same([stream.answers() for stream in streams], [base, adapted])
    assert post(server, "unload_lora_adapter", {"lora_name": "a"}).status_code == 200


def test_streams_go_on_when_either_rank_is_killed(server: Server) -> None:
    assert post(server, "update_weights_from_disk", {"model_path": "demo"}).status_code == 200
    before = [stream.answers() for stream in [Stream(server.url, body) for body in BODIES]]
    returned = server.log.count(RETURNED.format("scheduler"))
    for count, number in enumerate((1, 0), returned + 1):
        streams = [Stream(server.url, body) for body in BODIES]
        streams[0].reach(20)
        rank(server, number).kill()
        wait_for_return(server, "scheduler", count)
        assert_same([stream.answers() for stream in streams], before)
    assert requests.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200
    assert server.log.count("Ending the group.") >= 1


@pytest.fixture(scope="module")
def quantized() -> Iterator[Server]:
    own = ("--quantization", "int8", "--dtype", "bfloat16", "--enable-deterministic-inference")
    own = (*own, "--sleep-when-idle-s", "1", "--watchdog-timeout", "10", *MANY)
    with launched("--model-path", "demo", "--tp-size", "2", "--device", "cpu", *own) as server:
        yield server


def test_ranks_that_slept_wake_with_the_same_weights(quantized: Server) -> None:
    before = [stream.answers() for stream in [Stream(quantized.url, body) for body in BODIES]]
    quantized.wait_for("gave back the memory of weights and KV pool")
    assert [Stream(quantized.url, body).answers() for body in BODIES] == before
    quantized.wait_for("Took the memory again")


def test_streams_go_on_when_a_rank_stops_for_longer_than_the_watchdog_waits(quantized: Server) -> None:
    before = [stream.answers() for stream in [Stream(quantized.url, body) for body in BODIES]]
    streams = [Stream(quantized.url, body) for body in BODIES]
    streams[0].reach(20)
    stopped = rank(quantized, 1)
    stopped.suspend()
    wait_for_return(quantized, "scheduler")
    assert [stream.answers() for stream in streams] == before
    reasons = ("has not moved for 10 s", "was stopped for 10 s")  # the launcher and rank 0 both watch it
    assert any(reason in quantized.log for reason in reasons), quantized.log
    assert not stopped.is_running() and rank(quantized, 1).is_running()


@pytest.fixture(scope="module")
def groups() -> Iterator[Server]:
    own = ("--tp-size", "2", "--dp-size", "2", "--device", "cpu", *FLAGS)
    with launched("--model-path", "demo", *own) as server:
        yield server


def test_a_dead_groups_requests_go_on_in_another(groups: Server) -> None:
    before = [stream.answers() for stream in [Stream(groups.url, body) for body in BODIES]]
    start = len(groups.log)
    streams = [Stream(groups.url, {**body, "data_parallel_rank": 1}) for body in BODIES]
    streams[0].reach(20)
    follower(groups.children()["scheduler DP1 TP0"], "scheduler DP1 TP1").kill()
    assert_same([stream.answers() for stream in streams], before)
    groups.wait_for_match(r"The scheduler DP1 takes requests", start, WAIT_S)
    assert {event["meta_info"]["dp_rank"] for stream in streams for event in stream.events} == {0, 1}


def test_an_update_reaches_all_groups(groups: Server, versions: list[Path]) -> None:
    assert post(groups, "update_weights_from_disk", {"model_path": str(versions[1])}).json()["success"]
    found = post(groups, "weights_checker", {"action": "checksum"}).json()["ranks"]
    assert [entry["rank"] for entry in found] == [0, 1, 2, 3]
    assert all(entry["checksums"] == found[0]["checksums"] for entry in found)
