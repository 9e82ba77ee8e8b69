"""LoRA adapters on a whole server whose scheduler knows them by name alone: requests, commands and lists."""

import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import safetensors.torch
import torch

from tests.servers import Server

LIMIT = {"sampling_params": {"max_new_tokens": 3}}
TENSORS = base64.b64encode(safetensors.torch.save({"a": torch.zeros(100_000)})).decode()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like an adapter of the demo model to the launcher."""
    directory = tmp_path_factory.mktemp("adapters") / "sql"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": "demo"}))
    return directory


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server], adapter: Path) -> Server:
    """One that was started with the adapter as its model, and knows another from the start."""
    flags = ("--model-path", str(adapter), "--lora-paths", f"first={adapter}")
    return launch_for_module(*flags, services={"scheduler": "tests.fake_adapters"})


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    answer = requests.post(server.url + path, json=body, timeout=60)
    return answer.status_code, answer.json()


def listed(server: Server) -> list[tuple[str, str, str | None]]:
    cards = requests.get(server.url + "/v1/models", timeout=60).json()["data"]
    return [(card["id"], card["root"], card["parent"]) for card in cards]


def test_an_adapter_as_the_model_is_served_beside_its_base_and_others(server: Server, adapter: Path) -> None:
    own = ("sql", str(adapter), "demo")
    assert listed(server) == [("demo", "demo", None), own, ("first", str(adapter), "demo")]
    body = {"text": ["a", "b", "c"], "lora_path": ["sql", None, "first"], **LIMIT}
    metas = [answer["meta_info"] for answer in post(server, "/generate", body)[1]]
    assert [meta.get("lora_path") for meta in metas] == ["sql", None, "first"]
    assert [meta.get("adapter_version") for meta in metas] == ["1", None, "1"]


def test_an_adapter_is_loaded_replaced_used_and_unloaded_behind_its_requests(server: Server) -> None:
    body = {"lora_name": "chat", "lora_path": "/x"}
    assert post(server, "/load_lora_adapter", body)[1]["loaded_adapters"]["chat"] == "/x"
    status, refused = post(server, "/load_lora_adapter", body)
    assert (status, refused["success"], refused["loaded_adapters"]["chat"]) == (400, False, "/x")
    assert "already loaded" in refused["error_message"]
    assert post(server, "/load_lora_adapter", {**body, "lora_path": "/y", "load_inplace": True})[0] == 200
    long = {"text": "a", "lora_path": "chat", "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}
    with ThreadPoolExecutor(1) as threads:
        stream = requests.post(server.url + "/generate", json={**long, "stream": True}, stream=True, timeout=60)
        lines = stream.iter_lines()
        next(lines)  # it runs
        unloading = threads.submit(post, server, "/unload_lora_adapter", {"lora_name": "chat"})
        chunks = [line for line in lines if line]
        assert unloading.result()[1]["error_message"] == ""
    meta = json.loads(chunks[-2].removeprefix(b"data: "))["meta_info"]
    assert (meta["completion_tokens"], meta["adapter_version"]) == (100, "2")
    assert post(server, "/generate", long)[0] == 400
    assert post(server, "/v1/completions", {"model": "chat", "prompt": "x"})[0] == 404


def test_an_adapter_comes_over_the_wire_and_leaves_no_file(server: Server) -> None:
    body = {"lora_name": "rl", "config_dict": {"r": 4}, "serialized_named_tensors": [TENSORS]}
    assert post(server, "/load_lora_adapter_from_tensors", body)[1]["loaded_adapters"]["rl"] == "__tensor__"
    chat = {"model": "demo:rl", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    [choice] = post(server, "/v1/chat/completions", {**chat, "return_meta_info": True})[1]["choices"]
    assert choice["meta_info"]["lora_path"] == "rl"
    pickled = base64.b64encode(b"\x80\x04\x95" + bytes(50)).decode()
    status, refused = post(
        server, "/load_lora_adapter_from_tensors", {**body, "lora_name": "x", "serialized_named_tensors": [pickled]}
    )
    assert status == 400 and "no tensors" in refused["error_message"] and "rl" in refused["loaded_adapters"]
    assert list(server.run_base.rglob("payload-*")) == []
