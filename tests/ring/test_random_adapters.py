"""A thousand random commands and requests for LoRA adapters over HTTP, against a model of what should happen.

Every token tells which adapter made it (tests/adapters.py). Requests run while adapters are replaced and unloaded under
them; there are more adapters than memory is allowed for.
"""

import base64
import itertools
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from safetensors.torch import save

from tests.adapters import BASE_TOKEN, FIRST_TOKEN, telling_adapter, telling_base, telling_settings, telling_tensors
from tests.servers import Server

pytestmark = pytest.mark.slow

ACTIONS = 1000
NAMES = ["a", "b", "c", "d", "e", "f"]
MOST_LOADED = 3
CONTENTS = 40  # different adapters, of which a name has one at a time
MOST_PENDING = 8  # requests that run
WAIT_S = 120
PROMPTS = [list(range(20, 20 + length)) for length in (3, 17, 40)]  # each begins like the next


@dataclass(frozen=True)
class Moment:
    """What a name means at some time."""

    version: int  # 0: it is unknown
    unloads: int  # so far


@dataclass
class Asked:
    """A request that was sent."""

    name: str
    tokens: int
    sent: Moment
    answer: "Future[requests.Response]"


class Model:
    """The server, and what its users know of it."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.server = server
        self.paths = [telling_adapter(directory / str(i), i, rank=1 + i % 5) for i in range(CONTENTS)]
        self.contents: dict[int, tuple[str, int]] = {}  # version → the name that had it, and its content
        self.current: dict[str, int] = {}  # name → version
        self.unloads = dict.fromkeys(NAMES, 0)
        self.pending: list[Asked] = []
        self.pool = ThreadPoolExecutor(2 * MOST_PENDING)
        self.counts = dict.fromkeys(["answers", "refused", "changed", "full"], 0)

    def post(self, path: str, body: Any, stream: bool = False) -> requests.Response:
        return requests.post(self.server.url + path, json=body, timeout=WAIT_S, stream=stream)

    def moment(self, name: str) -> Moment:
        return Moment(self.current.get(name, 0), self.unloads.get(name, 0))

    # Commands

    def load(self, name: str, content: int, in_place: bool, over_the_wire: bool) -> None:
        body: dict[str, Any] = {"lora_name": name, "load_inplace": in_place}
        if over_the_wire:
            tensors = base64.b64encode(save(telling_tensors(content))).decode()
            body |= {"config_dict": telling_settings(), "serialized_named_tensors": [tensors]}
            answer = self.post("/load_lora_adapter_from_tensors", body)
        else:
            answer = self.post("/load_lora_adapter", {**body, "lora_path": str(self.paths[content])})
        error = answer.json()["error_message"]
        if name in self.current and not in_place:
            assert answer.status_code == 400 and "loaded already" in error, answer.text
        elif "--max-loaded-loras allows no more" in error:
            assert self.pending and name not in self.current, "else one can be evicted"
            self.counts["full"] += 1
        else:
            assert answer.status_code == 200 and not error, answer.text
            before = set(self.contents)
            self.current[name] = self.versions()[name]
            assert self.current[name] not in before, "a version is given once"
            self.contents[self.current[name]] = name, content
        assert self.versions() == self.current

    def unload(self, name: str) -> None:
        answer = self.post("/unload_lora_adapter", {"lora_name": name})
        assert (answer.status_code == 200) == (name in self.current), answer.text
        if name in self.current:
            del self.current[name]
            self.unloads[name] += 1
        assert self.versions() == self.current
        assert set(answer.json()["loaded_adapters"]) == set(self.current)

    def versions(self) -> dict[str, int]:
        known = requests.get(f"{self.server.url}/model_info", timeout=WAIT_S).json()["lora_adapters"]
        assert sum(adapter["loaded"] for adapter in known) <= MOST_LOADED
        return {adapter["name"]: int(adapter["version"]) for adapter in known}

    # Requests

    def ask(self, name: str, prompt: list[int], tokens: int, stream: bool) -> None:
        """Send a request; a stream is read to its first event, so that it is certainly taken before what comes next."""
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": params, "lora_path": name or None, "stream": stream}
        sent = self.moment(name)
        if not stream:
            self.pending.append(Asked(name, tokens, sent, self.pool.submit(self.post, "/generate", body)))
            return
        answer = self.post("/generate", body, stream=True)
        assert (answer.status_code == 200) == (not name or sent.version > 0), answer.text
        if answer.status_code == 200:
            lines = answer.iter_lines()
            first = next(line for line in lines if line)
            self.pending.append(Asked(name, tokens, sent, self.pool.submit(lambda: Read(first, [*lines]))))  # type: ignore[arg-type, return-value]

    def collect(self, most_left: int) -> None:
        """Check the answers that are there, and wait until at most so many requests run."""
        while len(self.pending) > most_left:
            self.check(self.pending.pop(0))
        for asked in [asked for asked in self.pending if asked.answer.done()]:
            self.pending.remove(asked)
            self.check(asked)

    def check(self, asked: Asked) -> None:
        answer, end = asked.answer.result(), self.moment(asked.name)
        known_all_the_time = asked.sent.version > 0 and asked.sent.unloads == end.unloads
        if answer.status_code != 200:
            assert asked.name and not known_all_the_time, answer.text
            assert answer.status_code == 400 and "never been loaded" in answer.text, answer.text
            self.counts["refused"] += 1
            return
        told = answer.json()
        runs = told["meta_info"]["weight_versions"]
        assert len(told["output_ids"]) == asked.tokens == runs[-1]["end"]
        if not asked.name:
            assert set(told["output_ids"]) == {BASE_TOKEN}
            return
        versions = [int(run["adapter_version"]) for run in runs]
        assert versions == sorted(set(versions)) and versions[0] >= asked.sent.version
        assert not known_all_the_time or versions[-1] <= end.version
        for run, version in zip(runs, versions, strict=True):
            name, content = self.contents[version]
            assert name == asked.name
            assert set(told["output_ids"][run["start"] : run["end"]]) == {FIRST_TOKEN + content}
        self.counts["answers"] += 1
        self.counts["changed"] += len(runs) > 1


class Read:
    """A stream that was read, as the answer that its last event is."""

    status_code, text = 200, ""

    def __init__(self, first: bytes, rest: list[bytes]) -> None:
        self.events = [first, *(line for line in rest if line)]

    def json(self) -> Any:
        assert self.events[-1] == b"data: [DONE]"
        return json.loads(self.events[-2].removeprefix(b"data: "))


@pytest.fixture
def model(launch: Callable[..., Server], tmp_path: Path) -> Model:
    base = telling_base(tmp_path / "base")
    memory = ("--max-total-tokens", "256", "--page-size", "4", "--chunked-prefill-size", "16")
    lora = ("--enable-lora", "--max-loaded-loras", str(MOST_LOADED), "--max-loras-per-batch", "2")
    flags = ("--model-path", str(base), "--skip-tokenizer-init", "--device", "cpu", "--log-level-http", "warning")
    return Model(launch(*flags, *memory, *lora), tmp_path)


def test_a_thousand_random_commands_and_requests_do_what_a_model_of_them_says(model: Model) -> None:
    dice = random.Random(0)
    for _ in range(ACTIONS):
        name = dice.choice(NAMES)
        match dice.choice(["load", "load", "unload", "ask", "ask", "ask", "ask", "ask"]):
            case "load":
                model.load(name, dice.randrange(CONTENTS), dice.random() < 0.7, dice.random() < 0.5)
            case "unload":
                model.unload(name)
            case _:
                asked = dice.choice([name, name, name, ""])
                model.ask(asked, dice.choice(PROMPTS), dice.choice([1, 5, 30]), dice.random() < 0.5)
        model.collect(MOST_PENDING)
    model.collect(0)
    assert min(model.counts.values()) > 0 and model.counts["answers"] > ACTIONS // 4, model.counts
    leaves_nothing_behind(model)


def leaves_nothing_behind(model: Model) -> None:
    owned = list(model.server.run_base.rglob("adapters/*/adapter_config.json"))
    assert len(owned) <= len(model.current), "what came over the wire goes with its adapter"
    for name in list(itertools.chain(model.current)):
        model.unload(name)
    url = model.server.url
    assert requests.get(f"{url}/flush_cache?timeout=10", timeout=WAIT_S).status_code == 200
    load = requests.get(f"{url}/v1/loads", timeout=WAIT_S).json()["loads"][0]
    assert (load["num_reqs"], load["num_used_tokens"]) == (0, 0)
    deadline = time.monotonic() + WAIT_S
    while kept := list(model.server.run_base.rglob("adapters/*")):  # until the gateway lets them go
        assert time.monotonic() < deadline, kept
        time.sleep(0.1)
    assert list(model.server.run_base.rglob("payload-*")) == []
    assert "do not balance" not in model.server.log
    assert "Traceback" not in model.server.log
