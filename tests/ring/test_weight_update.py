"""Weights that change while clients stream, over HTTP and with all processes: what is said, and what is lost."""

import base64
import json
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from safetensors.torch import save

from deploy.benchmarks import half_billion
from tests import checkpoints
from tests.servers import Server

pytestmark = pytest.mark.slow

WAIT_S = 120
FIRST = 40  # version v answers token FIRST + v
VERSIONS = 3
STREAMS, UPDATES, TOKENS = 8, 6, 200
PROMPT = list(range(10, 42))
HUB_ID = "qwen/qwen2.5-0.5b-instruct-wrong"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("versions")
    directories = [checkpoints.version_model(place / str(v), FIRST + v) for v in range(VERSIONS)]
    for directory in directories:
        half_billion.write_tokenizer(directory)
    return directories


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server], versions: list[Path]) -> Server:
    flags = ("--page-size", "4", "--max-total-tokens", "16384", "--weight-version", "0", "--device", "cpu")
    return launch_for_module("--model-path", str(versions[0]), *flags)


def post(server: Server, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=WAIT_S)


def get(server: Server, path: str) -> Any:
    return requests.get(server.url + path, timeout=WAIT_S).json()


def generate(server: Server, tokens: int) -> Any:
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return post(server, "/generate", {"input_ids": PROMPT, "sampling_params": params}).json()


def served_token(server: Server) -> int:
    return int(generate(server, 1)["output_ids"][0])


def update(server: Server, directory: Path | str, **fields: Any) -> requests.Response:
    return post(server, "/update_weights_from_disk", {"model_path": str(directory), **fields})


@pytest.fixture
def first_version(server: Server, versions: list[Path]) -> None:
    """Whatever earlier tests have left, version 0 serves."""
    assert update(server, versions[0], weight_version="0").status_code == 200


@pytest.mark.usefixtures("first_version")
def test_nothing_is_lost_and_every_span_is_proved_by_the_text(server: Server, versions: list[Path]) -> None:
    words = [post(server, "/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}})]
    answers: list[dict[str, Any]] = []
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            answers.append(generate(server, TOKENS))

    clients = [threading.Thread(target=client) for _ in range(STREAMS)]
    for thread in clients:
        thread.start()
    for version in range(1, UPDATES + 1):
        answer = update(server, versions[version % VERSIONS], weight_version=str(version))
        expected = f"Succeeded to update model weights. Weight version updated to {version}."
        assert answer.json() == {"success": True, "message": expected, "num_paused_requests": 0}
    done.set()
    for thread in clients:
        thread.join()
    assert words[0].status_code == 200 and len(answers) >= STREAMS
    for answer in answers:
        meta = answer["meta_info"]
        assert meta["finish_reason"] == {"type": "length", "length": TOKENS}
        assert len(answer["output_ids"]) == TOKENS
        made = []
        for span in meta["weight_versions"]:
            assert span["start"] == len(made)
            made += [FIRST + int(span["version"]) % VERSIONS] * (span["end"] - span["start"])
        assert answer["output_ids"] == made
        assert meta["weight_version"] == meta["weight_versions"][-1]["version"]
    assert max(len(answer["meta_info"]["weight_versions"]) for answer in answers) > 1


@pytest.mark.usefixtures("first_version")
def test_the_server_is_called_after_the_weights_it_serves(server: Server, versions: list[Path]) -> None:
    tokenizer = get(server, "/get_model_info")["tokenizer_path"]
    assert post(server, "/update_weights", {"model_path": str(versions[1])}).json()["success"]
    info = get(server, "/get_model_info")
    assert set(info) == {
        "model_path",
        "tokenizer_path",
        "is_generation",
        "preferred_sampling_params",
        "weight_version",
    }
    assert (info["model_path"], info["tokenizer_path"]) == (str(versions[1]), tokenizer)
    assert get(server, "/model_info")["served_model_name"] == str(versions[1])
    assert [card["id"] for card in get(server, "/v1/models")["data"]] == [str(versions[1])]


@pytest.mark.usefixtures("first_version")
def test_a_wrong_path_is_a_400_in_the_words_that_clients_compare(server: Server, versions: list[Path]) -> None:
    answer = update(server, HUB_ID, weight_version="wrong")
    message = f"Failed to get weights iterator: {HUB_ID} (repository not found)."
    assert answer.status_code == 400
    assert answer.json() == {"success": False, "message": message, "num_paused_requests": 0}
    assert get(server, "/get_model_info")["model_path"] == str(versions[0])
    assert get(server, "/get_weight_version") == {"weight_version": "0"}
    assert served_token(server) == FIRST
    server.wait_for('"POST /update_weights_from_disk HTTP/1.1" 400 Bad Request')
    lines = [line for line in server.log.splitlines() if "pdate" in line or "Failed to get" in line]
    start = max(i for i, line in enumerate(lines) if "Start update_weights. Load format=auto" in line)
    assert "Update engine weights online from disk begin. avail mem=" in lines[start + 1]
    assert message in lines[start + 2]


@pytest.mark.usefixtures("first_version")
def test_another_version_than_expected_is_a_409(server: Server, versions: list[Path]) -> None:
    answer = update(server, versions[1], expected_version="7")
    assert (answer.status_code, answer.json()["success"]) == (409, False)
    assert served_token(server) == FIRST


@pytest.mark.usefixtures("first_version")
def test_a_prefix_of_the_old_weights_is_not_used(server: Server, versions: list[Path]) -> None:
    generate(server, 1)
    assert generate(server, 1)["meta_info"]["cached_tokens"] > 0
    update(server, versions[2], weight_version="2", flush_cache=False)
    answer = generate(server, 1)
    assert (answer["meta_info"]["cached_tokens"], answer["output_ids"]) == (0, [FIRST + 2])


# tensors in the body


def head(token: int) -> bytes:
    values = torch.zeros(checkpoints.VOCAB_SIZE, 64)
    values[token] = 1.0
    return save({"lm_head.weight": values})


def from_tensor(server: Server, payload: bytes, **fields: Any) -> requests.Response:
    entry = base64.b64encode(payload).decode()
    return post(server, "/update_weights_from_tensor", {"serialized_named_tensors": [entry], **fields})


def payload_files(server: Server) -> list[Path]:
    return list(server.run_base.rglob("payload-*"))


@pytest.mark.usefixtures("first_version")
def test_tensors_in_the_body_are_served_and_leave_no_file(server: Server) -> None:
    answer = from_tensor(server, head(FIRST + 9), flush_cache=False, weight_version="9")
    assert answer.json() == {"success": True, "message": "Success Weight version updated to 9."}
    assert served_token(server) == FIRST + 9
    assert get(server, "/get_weight_version") == {"weight_version": "9"}
    rows = post(server, "/get_weights_by_name", {"name": "lm_head.weight", "truncate_size": FIRST + 10}).json()
    assert [sum(row) for row in rows] == [0.0] * (FIRST + 9) + [64.0]
    assert payload_files(server) == []


@pytest.mark.usefixtures("first_version")
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"serialized_named_tensors": [base64.b64encode(b"\x80\x04\x95" + bytes(50)).decode()]}, "pickles are never"),
        ({"serialized_named_tensors": ["*"]}, "not valid base64"),
        ({"serialized_named_tensors": ["QUJD"]}, "the payload: the header claims"),
        ({"serialized_named_tensors": [7]}, "a list of base64 strings"),
        ({"serialized_named_tensors": []}, "one entry for each of 1 ranks, got 0"),
        ({"payload_files": ["/etc/passwd"]}, "one entry for each of 1 ranks, got 0"),
        ({"serialized_named_tensors": ["QUJD"], "load_format": "my.own.loader"}, "load_format my.own.loader is not"),
    ],
)
def test_bodies_that_cannot_be_served_are_refused(server: Server, body: dict[str, Any], says: str) -> None:
    answer = post(server, "/update_weights_from_tensor", body)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert says in answer.json()["message"]
    assert str(server.run_base) not in answer.text
    assert payload_files(server) == []
    assert served_token(server) == FIRST


@pytest.mark.usefixtures("first_version")
def test_a_full_disk_fails_the_update_and_nothing_else(server: Server) -> None:
    gateway = psutil.Process(server.children()["gateway"].pid)
    limits = gateway.rlimit(resource.RLIMIT_FSIZE)
    gateway.rlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        answer = from_tensor(server, head(FIRST + 9))
    finally:
        gateway.rlimit(resource.RLIMIT_FSIZE, limits)
    assert answer.status_code == 500
    assert answer.json() == {"success": False, "message": "The payload could not be stored: File too large."}
    assert payload_files(server) == []
    assert served_token(server) == FIRST
    assert from_tensor(server, head(FIRST + 9)).json()["success"]


def test_what_serves_is_recorded_in_the_run_directory(server: Server, versions: list[Path]) -> None:
    update(server, versions[1], weight_version="recorded")
    [record] = server.run_base.rglob("weights.json")
    said = json.loads(record.read_bytes())
    assert (said["model_dir"], said["weight_version"]) == (str(versions[1]), "recorded")
