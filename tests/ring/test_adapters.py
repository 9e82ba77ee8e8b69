"""LoRA adapters behind a whole server against peft: mixed batches, prefixes, retraction, replacement, a death."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.model.tiny import build
from tests.peft_models import PeftModels
from tests.servers import Server

pytestmark = pytest.mark.slow

RANKS = {"a0": 3, "a1": 8, "a2": 16, "a3": 64}
NAMES = ["", *RANKS]
WAIT_S = 120
TOKENS = 12


class Case:
    """A server of a tiny Qwen2 with four adapters, and peft's models of the same files."""

    def __init__(self, launch: Callable[..., Server], directory: Path) -> None:
        base = build("qwen2", directory / "base")
        self.directory = directory
        self.oracle = PeftModels(base)
        flags = ("--enable-lora", "--skip-tokenizer-init", "--dtype", "float32", "--device", "cpu", "--page-size", "4")
        self.server = launch("--model-path", str(base), "--max-total-tokens", "4096", *flags)
        self.current = {"": ""}  # name → its adapter's name among the oracle's
        for seed, (name, rank) in enumerate(RANKS.items()):
            self.load(name, rank, seed)

    def load(self, name: str, rank: int, seed: int, **body: Any) -> None:
        """Serve a new adapter under a name."""
        made = f"{name}-{seed}"
        self.oracle.add(made, rank, seed)
        path = self.oracle.save(made, self.directory)
        answer = self.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **body})
        assert answer["success"] and answer["loaded_adapters"][name] == str(path)
        self.current[name] = made

    def post(self, path: str, body: Any) -> Any:
        answer = requests.post(self.server.url + path, json=body, timeout=WAIT_S)
        assert answer.ok, answer.text
        return answer.json() if answer.content else None

    def ask(self, names: list[str], prompt: list[int], tokens: int = TOKENS) -> list[dict[str, Any]]:
        """One batch of greedy requests, each by an adapter of its own."""
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"input_ids": [prompt] * len(names), "sampling_params": params, "return_logprob": True}
        answers: list[dict[str, Any]] = self.post("/generate", {**body, "lora_path": [name or None for name in names]})
        return answers

    def check(self, names: list[str], prompt: list[int], answers: list[dict[str, Any]]) -> None:
        for name, answer in zip(names, answers, strict=True):
            self.oracle.check(self.current[name], prompt, answer)
            assert answer["meta_info"].get("lora_path", "") == name

    @contextmanager
    def running(self, names: list[str], prompt: list[int], tokens: int) -> Iterator[list[dict[str, Any]]]:
        """A slow batch that certainly runs inside; its answers are there behind the block."""
        self.post("/slow_down", {"forward_sleep_time": 0.02})
        answers: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: answers.extend(self.ask(names, prompt, tokens)))
        thread.start()
        ends_at = time.monotonic() + WAIT_S
        while self.load_now() < len(names):
            assert time.monotonic() < ends_at
        yield answers
        thread.join(WAIT_S)
        self.post("/slow_down", {"forward_sleep_time": None})
        assert len(answers) == len(names)

    def load_now(self) -> int:
        """Requests that run."""
        load = requests.get(self.server.url + "/v1/loads?include=core", timeout=WAIT_S).json()["loads"][0]
        return int(load["num_running_reqs"])


@pytest.fixture(scope="module")
def case(launch_for_module: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(launch_for_module, tmp_path_factory.mktemp("adapters"))


def prompt_of(number: int) -> list[int]:
    """Twenty tokens that no other test has asked for."""
    return [(number * 37 + i * i * 11) % 200 + 20 for i in range(20)]


def test_a_batch_of_the_base_and_four_adapters_is_that_of_peft_with_its_own_prefixes_only(case: Case) -> None:
    prompt = prompt_of(1)
    first = case.ask(NAMES, prompt)
    case.check(NAMES, prompt, first)
    assert [answer["meta_info"]["cached_tokens"] for answer in first] == [0] * len(NAMES)
    assert len({tuple(answer["output_ids"]) for answer in first}) == len(NAMES), "the adapters change the answers"
    names = [*NAMES[::-1], *NAMES]
    again = case.ask(names, prompt)
    case.check(names, prompt, again)
    assert all(answer["meta_info"]["cached_tokens"] >= 16 for answer in again)


def test_a_batch_that_was_retracted_is_that_of_peft(case: Case) -> None:
    prompt = prompt_of(2)
    with case.running(NAMES, prompt, 24) as answers:
        case.post("/pause_generation", {"mode": "retract"})
        case.post("/continue_generation", {})
    case.check(NAMES, prompt, answers)
    assert all(answer["meta_info"]["num_retractions"] > 0 for answer in answers)


def test_an_adapter_that_is_replaced_under_its_requests_makes_the_tokens_from_there_on(case: Case) -> None:
    prompt, before = prompt_of(3), case.current["a1"]
    with case.running(NAMES, prompt, 60) as answers:
        case.load("a1", rank=5, seed=77, load_inplace=True)
    for name, answer in zip(NAMES, answers, strict=True):
        runs = answer["meta_info"]["weight_versions"]
        if name != "a1":
            assert len(runs) == 1
            case.oracle.check(case.current[name], prompt, answer)
            continue
        old, new = runs
        assert (old["start"], old["end"], new["end"]) == (0, new["start"], 60)
        assert int(old["adapter_version"]) < int(new["adapter_version"]) and old["version"] == new["version"]
        case.oracle.check_parts([(before, old["end"]), (case.current["a1"], new["end"])], prompt, answer)
    [fresh, base] = case.ask(["a1", ""], prompt)
    assert fresh["meta_info"]["cached_tokens"] == 0, "nothing of its predecessor is used"
    assert base["meta_info"]["cached_tokens"] >= 16
    case.check(["a1", ""], prompt, [fresh, base])


def test_a_scheduler_that_is_started_again_has_its_adapters_and_goes_on_with_their_requests(case: Case) -> None:
    prompt = prompt_of(4)
    [told] = case.ask(["a2"], prompt, 1)
    with case.running(NAMES, prompt, 40) as answers:
        case.server.children()["scheduler"].kill()
    case.check(NAMES, prompt, answers)
    version = answers[NAMES.index("a2")]["meta_info"]["adapter_version"]
    assert version == told["meta_info"]["adapter_version"]
    case.check(NAMES, prompt, case.ask(NAMES, prompt))
