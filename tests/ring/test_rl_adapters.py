"""The calls by which RL trainers sync LoRA adapters, in their order and with their bodies, against a whole server.

verl: `ServerAdapter.update_weights` and `AsyncHttpServerAdapter`; miles, slime's sibling that trains adapters:
`SGLangEngine` and `_send_to_colocated_engine`; AReaL: `SGLangBackend`. Their payloads are pickles where SGLang serves,
and safetensors bytes here. Every token tells which adapter made it (tests/adapters.py).
"""

import base64
import hashlib
import json
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

from tests.adapters import FIRST_TOKEN, telling_adapter, telling_base, telling_settings, telling_tensors
from tests.servers import Server

pytestmark = pytest.mark.slow

WAIT_S = 60
PROMPT = list(range(10, 42))
PAUSED = {"message": "Generation paused successfully.", "status": "ok"}
VERL_NAME = "verl_actor_lora_name"
MILES_NAME = "miles_lora"


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    base = telling_base(tmp_path_factory.mktemp("base"))
    flags = ("--skip-tokenizer-init", "--enable-memory-saver", "--max-total-tokens", "16384", "--device", "cpu")
    lora = ("--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", "all")
    return launch_for_module("--model-path", str(base), *flags, *lora)


class Client:
    """Calls of one trainer."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: Any = None, status: int = 200) -> Any:
        answer = requests.post(self.url + path, json={} if body is None else body, timeout=WAIT_S)
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def get(self, path: str) -> Any:
        answer = requests.get(self.url + path, timeout=WAIT_S)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer

    def models(self) -> set[str]:
        return {model["id"] for model in self.get("/v1/models").json()["data"]}

    def generate(self, adapter: str, tokens: int = 3, **body: Any) -> Any:
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        fields = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "lora_path": adapter}
        return self.post("/generate", {**fields, **body})

    @contextmanager
    def running(self, adapter: str, tokens: int = 60) -> Iterator[list[Any]]:
        """Two slow rollouts that certainly run inside; their answers are there behind the block."""
        self.post("/slow_down", {"forward_sleep_time": 0.02})
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(self.generate(adapter, tokens))) for _ in range(2)]
        for thread in threads:
            thread.start()
        ends_at = time.monotonic() + WAIT_S
        while self.load() < len(threads):
            assert time.monotonic() < ends_at
        yield answers
        for thread in threads:
            thread.join(WAIT_S)
        assert len(answers) == len(threads)
        self.post("/slow_down", {"forward_sleep_time": None})

    def load(self) -> int:
        load = self.get("/v1/loads?include=core").json()["loads"][0]
        return int(load["num_running_reqs"] + load["num_waiting_reqs"])


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """Nothing is loaded at the begin, nothing is paused at the end."""
    client = Client(server.url)
    for name in client.models() - {client.get("/get_model_info").json()["model_path"]}:
        requests.post(f"{client.url}/unload_lora_adapter", json={"lora_name": name}, timeout=WAIT_S)
    yield client
    client.post("/continue_generation")


def spans(answer: Any) -> list[set[int]]:
    """Which telling adapters made an answer: one set for each of its spans, which must cover it."""
    runs = answer["meta_info"]["weight_versions"]
    assert [run["end"] for run in runs[:-1]] == [run["start"] for run in runs[1:]]
    assert (runs[0]["start"], runs[-1]["end"]) == (0, len(answer["output_ids"]))
    return [{token - FIRST_TOKEN for token in answer["output_ids"][run["start"] : run["end"]]} for run in runs]


def plain(tensors: dict[str, torch.Tensor]) -> str:
    return base64.b64encode(save(tensors)).decode()


def bucket(tensors: dict[str, torch.Tensor]) -> str:
    """A FlattenedTensorBucket in safetensors."""
    entries, end = [], 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries.append(
            {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype), "start_idx": start, "end_idx": end}
        )
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()])
    return base64.b64encode(save({"flattened_tensor": flat}, {"metadata": json.dumps(entries)})).decode()


def checksums(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def settings_of_peft(rank: int) -> dict[str, Any]:
    """LoraConfig.to_dict() as verl sends it: enumerations by their values, sets as lists."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=telling_settings()["target_modules"],
        exclude_modules=None,
        bias="none",
    ).to_dict()
    for key in ("task_type", "peft_type"):
        config[key] = getattr(config[key], "value", config[key])
    return {**config, "target_modules": list(config["target_modules"])}


def test_verl_sends_tensors_under_one_name_while_the_cache_is_released(client: Client) -> None:
    for number in range(3):
        client.post("/release_memory_occupation", {"tags": ["kv_cache"], "reset_connector": True})
        if VERL_NAME in client.models():
            assert client.post("/unload_lora_adapter", {"lora_name": VERL_NAME})["success"]
        assert VERL_NAME not in client.models()
        config, tensors = settings_of_peft(8), telling_tensors(number, rank=8)
        body = {"lora_name": VERL_NAME, "config_dict": config, "serialized_named_tensors": [plain(tensors)]}
        loaded = client.post("/load_lora_adapter_from_tensors", body)
        assert loaded == {"success": True, "error_message": "", "loaded_adapters": {VERL_NAME: "__tensor__"}}
        client.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
        client.get("/flush_cache?reset_connector=true")
        answer = client.generate(VERL_NAME, rid=f"verl-{number}", image_data=None)
        assert spans(answer) == [{number}] and answer["meta_info"]["cached_tokens"] == 0


def test_miles_unloads_and_loads_one_name_while_its_rollouts_wait(client: Client) -> None:
    def sync(number: int, loaded: bool) -> None:
        if loaded:
            assert client.post("/unload_lora_adapter", {"lora_name": MILES_NAME})["success"]
        tensors = telling_tensors(number)
        body = {
            "lora_name": MILES_NAME,
            "config_dict": telling_settings(),
            "pinned": False,
            "serialized_named_tensors": [bucket(tensors)],
            "load_format": "flattened_bucket",
            "expected_checksums": checksums(tensors),
        }
        assert client.post("/load_lora_adapter_from_tensors", body)["success"]

    sync(5, loaded=False)
    with client.running(MILES_NAME) as answers:
        assert client.post("/pause_generation", {"mode": "retract"}) == PAUSED
        client.get("/flush_cache")
        sync(6, loaded=True)
        client.post("/continue_generation")
    assert [spans(answer) for answer in answers] == [[{5}, {6}]] * 2
    assert all(len(answer["output_ids"]) == 60 for answer in answers)
    sync(7, loaded=True)
    assert client.post("/update_weight_version", {"new_version": "7"})["success"]
    assert spans(client.generate(MILES_NAME)) == [{7}]
    assert client.get("/model_info").json()["weight_version"] == "7"


def test_miles_replaces_an_adapter_in_place_and_has_its_tensors_compared(client: Client) -> None:
    def sync(number: int, expected: int, status: int = 200) -> Any:
        body = {
            "lora_name": MILES_NAME,
            "config_dict": telling_settings(),
            "pinned": False,
            "serialized_tensors": bucket(telling_tensors(number)),
            "upsert": True,
            "load_format": "flattened_bucket",
            "expected_checksums": checksums(telling_tensors(expected)),
        }
        return client.post("/load_lora_adapter_from_tensors", body, status)

    assert sync(1, 1)["success"]
    with client.running(MILES_NAME) as answers:
        refused = sync(3, 2, status=400)
        assert not refused["success"] and "has another SHA-256 than" in refused["error_message"]
        assert sync(2, 2)["success"]
    assert [spans(answer) for answer in answers] == [[{1}, {2}]] * 2


def test_areal_names_versions_and_unloads_an_old_one_while_its_rollouts_wait(client: Client, tmp_path: Path) -> None:
    paths = [telling_adapter(tmp_path / str(number), number) for number in range(3)]
    payload = {
        "input_ids": PROMPT,
        "image_data": None,
        "sampling_params": {
            "top_p": 1.0,
            "top_k": int(1e8),
            "max_new_tokens": 3,
            "temperature": 1.0,
            "stop_token_ids": [],
            "ignore_eos": False,
            "skip_special_tokens": True,
            "frequency_penalty": 0.0,
        },
        "return_logprob": True,
        "stream": False,
    }
    client.get("/health")
    client.post("/load_lora_adapter", {"lora_name": "actor-v0", "lora_path": str(paths[0])})
    with client.running("actor-v0") as answers:
        client.post("/pause_generation", {"mode": "retract"})
        client.post("/load_lora_adapter", {"lora_name": "actor-v1", "lora_path": str(paths[1])})
        unloaded = client.post("/unload_lora_adapter", {"lora_name": "actor-v0"})
        assert unloaded["success"] and unloaded["loaded_adapters"] == {"actor-v1": str(paths[1])}
        client.post("/generate", {**payload, "lora_path": "actor-v0"}, status=400)
        client.post("/unload_lora_adapter", {"lora_name": "actor-v7"}, status=400)  # it does not mind
        client.post("/continue_generation")
        sampled = client.post("/generate", {**payload, "lora_path": "actor-v1"})
        assert len(sampled["meta_info"]["output_token_logprobs"]) == 3
        assert sampled["meta_info"]["finish_reason"]["type"] == "length"
    assert [spans(answer) for answer in answers] == [[{0}]] * 2, "they end as they began"
    assert all(len(answer["output_ids"]) == 60 for answer in answers)
    client.post("/load_lora_adapter", {"lora_name": "actor-v0", "lora_path": str(paths[2])})  # it was forgotten
    assert spans(client.generate("actor-v0")) == [{2}]
