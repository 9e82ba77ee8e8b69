"""A server of a GGUF file, over HTTP and with all processes: names, answers, updates, restarts and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from quartet.runtime.launcher.supervisor import ExitStatus
from quartet.runtime.sampling import SamplingParams
from tests import checkpoints, gguf_files
from tests.engine import Engine
from tests.model import tiny
from tests.servers import Server

pytestmark = pytest.mark.slow

WAIT_S = 120
PROMPT = list(range(10, 42))
TOKENS = 12
FLAGS = ("--dtype", "float32", "--device", "cpu", "--max-total-tokens", "4096")
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("model") / "original")


@pytest.fixture(scope="module")
def file(original: Path) -> Path:
    return gguf_files.convert(original, original.parent / "model.gguf", tokenizer__chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server], file: Path) -> Server:
    return launch_for_module("--model-path", str(file), *FLAGS)


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    return requests.post(server.url + path, json=body, timeout=WAIT_S).json()


def get(server: Server, path: str) -> Any:
    return requests.get(server.url + path, timeout=WAIT_S).json()


def output(server: Server) -> list[int]:
    params = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    found: list[int] = post(server, "/generate", {"input_ids": PROMPT, "sampling_params": params})["output_ids"]
    return found


def test_the_answers_are_those_of_the_original_and_the_file_is_named(
    server: Server, original: Path, file: Path
) -> None:
    engine = Engine(original, dtype="float32", max_total_tokens=4096)
    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS, ignore_eos=True)
    assert output(server) == engine.generate([PROMPT], params)[0].ids
    assert get(server, "/get_model_info")["model_path"] == str(file)
    assert [model["id"] for model in get(server, "/v1/models")["data"]] == [str(file)]
    assert get(server, "/v1/models")["data"][0]["max_model_len"] == 512


def test_the_template_of_the_file_makes_prompts_of_conversations(server: Server) -> None:
    messages = [{"role": "user", "content": "hello world"}]
    chat = {"model": "any", "messages": messages, "max_tokens": 1}
    text = post(server, "/tokenize", {"prompt": "<user>hello world", "add_special_tokens": False})
    answer = post(server, "/v1/chat/completions", chat)
    assert answer["usage"]["prompt_tokens"] == text["count"]


def test_an_update_by_a_file_serves_and_outlives_the_death_of_the_scheduler(server: Server, tmp_path: Path) -> None:
    """The last test of this server: it has other weights from then on."""
    before = output(server)
    changed = gguf_files.convert(tiny.build("llama", tmp_path / "other", seed=1), tmp_path / "other.gguf")
    body = post(server, "/update_weights_from_disk", {"model_path": str(changed), "weight_version": "B"})
    assert body["success"], body
    after = output(server)
    assert after != before
    assert get(server, "/get_model_info")["model_path"] == str(changed)
    server.children()["scheduler"].kill()
    assert output(server) == after


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"general.architecture": "mamba"}, "holds a model of the architecture mamba, which is not supported"),
        ({"general.architecture": "llama"}, "has no llama.block_count"),
    ],
)
def test_a_file_that_cannot_be_served_ends_the_start_with_one_line(
    launch: Callable[..., Server], metadata: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", metadata, {})
    server = launch("--model-path", str(file), ready=False)
    assert server.wait() == ExitStatus.STARTUP
    printed = server.output().splitlines()
    assert len(printed) == 1
    assert printed[0].startswith(f"quartet: {file}") and said in printed[0]


def test_blocks_of_another_type_than_those_that_are_read_are_named(
    launch: Callable[..., Server], tmp_path: Path
) -> None:
    directory = checkpoints.random_model(tmp_path / "original", 0)
    file = gguf_files.convert(directory, tmp_path / "model.gguf")
    data = file.read_bytes()
    name = b"blk.0.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 16  # behind the number of dimensions and both of them
    file.write_bytes(data[:at] + b"\x10" + data[at + 1 :])
    server = launch("--model-path", str(file), ready=False)
    assert server.wait() == ExitStatus.STARTUP
    assert "tensor blk.0.attn_v.weight is IQ2_XXS, which is not supported" in server.output()
