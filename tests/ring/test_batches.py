"""Batches on a whole server: through the openai client, through `quartet run-batch`, and through deaths of both."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.servers import ROOT, Server, launched

CHAT = "/v1/chat/completions"
COUNT = 60
KEPT_S = 3600


def request(name: str, url: str = CHAT, **body: Any) -> bytes:
    said = [{"role": "user", "content": f"Tell me about {name}"}]
    conversation = {"messages": said, "max_tokens": 30, "ignore_eos": True}
    line = {"custom_id": name, "method": "POST", "url": url, "body": {"model": "demo", **(body or conversation)}}
    return json.dumps(line).encode() + b"\n"


REQUESTS = b"".join(request(f"r{i}") for i in range(COUNT))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = tmp_path_factory.mktemp("files")
    with launched("--files-store", str(store), "--api-key", "secret", "--max-running-requests", "4") as started:
        yield started


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=5) as made:
        yield made


def begin(client: openai.OpenAI, content: bytes) -> Any:
    file = client.files.create(
        file=("requests.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": KEPT_S}
    )
    assert file.expires_at == file.created_at + KEPT_S
    return client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"k": "v"},
        output_expires_after={"anchor": "created_at", "seconds": 2 * KEPT_S},
    )


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    for _ in range(600):
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        time.sleep(0.1)
    raise AssertionError(batch)


def results(client: openai.OpenAI, file_id: str) -> list[Any]:
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_the_openai_client_runs_a_batch_through_the_death_of_the_gateway(server: Server, client: openai.OpenAI):
    batch = begin(client, REQUESTS + request("wrong", messages=[], max_tokens=3))
    assert (batch.status, batch.metadata) == ("validating", {"k": "v"})
    while client.batches.retrieve(batch.id).request_counts.completed < 5:
        time.sleep(0.05)
    server.children()["gateway"].kill()
    server.wait_for("The gateway serves again")
    batch = ended(client, batch.id)
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed) == (COUNT + 1, COUNT)
    output = client.files.retrieve(batch.output_file_id)
    assert output.expires_at == output.created_at + 2 * KEPT_S
    answers = results(client, batch.output_file_id)
    assert sorted(answer["custom_id"] for answer in answers) == sorted(f"r{i}" for i in range(COUNT))
    assert all(answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers)
    [error] = results(client, batch.error_file_id)
    assert (error["custom_id"], error["response"]["status_code"]) == ("wrong", 400)
    assert batch.id in [listed.id for listed in client.batches.list(limit=1)]


def test_the_openai_client_cancels_a_batch_lists_files_and_deletes_them(client: openai.OpenAI):
    batch = begin(client, REQUESTS)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch.id)
    assert (batch.status, batch.request_counts.completed < COUNT) == ("cancelled", True)
    kept = [file.id for file in client.files.list(purpose="batch", limit=1)]
    assert batch.input_file_id in kept
    for file_id in kept:
        assert client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        client.files.retrieve(batch.input_file_id)


def test_a_wrong_file_and_a_wrong_key_are_told(server: Server, client: openai.OpenAI):
    failed = ended(client, begin(client, b"{broken\n").id)
    assert (failed.status, failed.errors.data[0].line) == ("failed", 1)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.files.list()


def run_batch(server: Server, source: Path, target: Path) -> "subprocess.Popen[str]":
    words = ["run-batch", str(source), str(target), "--url", server.url, "--concurrency", "4"]
    return subprocess.Popen(
        [sys.executable, "-m", "quartet.runtime.cli", *words],
        cwd=ROOT,
        env=os.environ | {"QUARTET_API_KEY": "secret"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_run_batch_loses_and_doubles_nothing_when_it_is_killed(server: Server, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    others = request("completion", "/v1/completions", prompt="x", max_tokens=2)
    others += request("response", "/v1/responses", input="x", max_output_tokens=2)
    others += request("embedding", "/v1/embeddings", input="x") + b"{broken\n"
    source.write_bytes(REQUESTS + others)
    for size in (1, 20_000):
        with run_batch(server, source, target) as process:
            while not target.exists() or target.stat().st_size < size:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
    assert target.stat().st_size > 20_000
    with run_batch(server, source, target) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"{COUNT + 2} requests were answered, 2 failed: {target}" in said
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    names = sorted(str(line["custom_id"]) for line in lines)
    assert names == sorted([*(f"r{i}" for i in range(COUNT)), "completion", "response", "embedding", "None"])
    failures = {line["custom_id"]: line for line in lines if (line["response"] or {}).get("status_code") != 200}
    assert "embedding model" in json.dumps(failures["embedding"]["response"]["body"])
    assert failures[None]["error"]["message"].startswith(f"line {COUNT + 4}: ")
