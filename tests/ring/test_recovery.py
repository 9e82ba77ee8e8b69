"""Processes of the ring are killed while requests run: every answer is the one that an undisturbed server gives.

Most tests share a server that lives through all of it, and count from where it stands.
"""

import itertools
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests

from quartet.runtime.launcher.supervisor import ExitStatus
from quartet.runtime.messages import ROLES
from tests import checkpoints
from tests.ring.conftest import FAKE_SCHEDULER
from tests.servers import Server

WAIT_S = 120
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "people": {"type": "integer"}}}
LENGTH = 120
FLAGS = ("--dtype", "float32", "--page-size", "4")
MANY = ("--max-restarts", "1000")
RETURNED = "The {} was started again"
IN_PROGRESS = "already in progress"


def body(prompt: str, **params: Any) -> dict[str, Any]:
    return {"text": prompt, "sampling_params": {"max_new_tokens": LENGTH, "ignore_eos": True, **params}}


# Each answer depends on its body alone; together they have every kind of state that a replay must rebuild.
BODIES = [
    body("The capital of France is", temperature=0),
    body("The capital of Japan is", temperature=0.9, sampling_seed=3),
    body("The capital of Kenya is", temperature=0.9, sampling_seed=4, top_k=20, frequency_penalty=0.7),
    body("The capital of Peru is", temperature=0.9, sampling_seed=5, presence_penalty=0.5, min_new_tokens=60),
    body("A city: ", temperature=0.9, sampling_seed=6, json_schema=json.dumps(SCHEMA), ignore_eos=False),
    body("One two", temperature=0.9, sampling_seed=7, regex="[a-z]{40,60} [0-9]{20}", ignore_eos=False),
    body("The capital of Egypt is", temperature=0.9, sampling_seed=8, stop=["qzx", " the end of it"], n=2),
    {**body("The capital of Norway is", temperature=0), "return_logprob": True, "logprob_start_len": 0},
    {**body("Hello", temperature=0.9, sampling_seed=9), "return_logprob": True, "top_logprobs_num": 2},
]


def answer_of(said: dict[str, Any]) -> dict[str, Any]:
    """What must not differ between two runs."""
    meta = said["meta_info"]
    kept = {"finish_reason", "prompt_tokens", "completion_tokens", "weight_version", "weight_versions"}
    kept.update(key for key in meta if key.endswith("logprobs"))
    return {"text": said["text"], "ids": said["output_ids"], **{key: meta.get(key) for key in sorted(kept)}}


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """Everything equal but probabilities, whose last digits depend on what else was in a step."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-3), place
    else:
        assert found == expected, place


class Stream(threading.Thread):
    """A streamed request, from its first event to its last."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.body = url, {**body, "stream": True}
        self.events: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.more = threading.Condition()
        self.start()

    def run(self) -> None:
        try:
            with requests.post(f"{self.url}/generate", json=self.body, stream=True, timeout=WAIT_S) as response:
                for line in response.iter_lines():
                    if line.startswith(b"data: {"):
                        with self.more:
                            self.events.append(json.loads(line[6:]))
                            self.more.notify_all()
        except requests.RequestException as error:
            self.error = error
        with self.more:
            self.more.notify_all()

    def reach(self, tokens: int) -> None:
        """Wait until it has so many tokens, or has ended."""
        with self.more:
            assert self.more.wait_for(lambda: not self.is_alive() or self.made >= tokens, WAIT_S), self.events[-1:]

    @property
    def made(self) -> int:
        return self.events[-1]["meta_info"]["completion_tokens"] if self.events else 0

    def answers(self) -> dict[int, dict[str, Any]]:
        """By index, what the last events said; every event has to carry on where the one before stopped."""
        self.join(WAIT_S)
        assert not self.is_alive() and self.error is None, self.error
        last: dict[int, dict[str, Any]] = {}
        for event in self.events:
            index = event.get("index", 0)
            before = last.get(index, event)
            assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"]
            assert event["text"].startswith(before["text"])
            last[index] = event
        return {index: answer_of(event) for index, event in last.items()}


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server]) -> Server:
    """The embedded model. Whoever kills a process of it waits until it is back."""
    return launch_for_module("--model-path", "demo", *MANY, *FLAGS, standby=True)


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[dict[int, dict[str, Any]]]:
    streams = [Stream(server.url, body) for body in BODIES]
    return [stream.answers() for stream in streams]


@pytest.fixture(scope="module")
def quick(launch_for_module: Callable[..., Server]) -> Server:
    """A scheduler without a model, which takes no time."""
    return launch_for_module(services=FAKE_SCHEDULER)


@pytest.fixture(scope="module")
def deadly(launch_for_module: Callable[..., Server]) -> Server:
    """One that ends with each request whose prompt begins with 77."""
    slow = {"QUARTET_FAKE_STEP_S": "0.02", "QUARTET_FAKE_DEADLY": "77"}
    return launch_for_module(*MANY, services=FAKE_SCHEDULER, environment=slow, standby=True)


@pytest.fixture(scope="module")
def watched(launch_for_module: Callable[..., Server]) -> Server:
    """One whose processes may stand still for three seconds."""
    slow = {"QUARTET_FAKE_STEP_S": "0.05"}
    return launch_for_module("--watchdog-timeout", "3", *MANY, services=FAKE_SCHEDULER, environment=slow, standby=True)


def restarts(server: Server) -> dict[str, int]:
    """How often each process was started again."""
    metrics = requests.get(f"{server.url}/metrics", timeout=WAIT_S).text
    found = re.findall(r'^quartet:restarts_total\{role="(.*)"\} (\S+)$', metrics, re.M)
    return {role: int(float(count)) for role, count in found}


def kill(server: Server, role: str) -> None:
    """Kill a process, and wait until the gateway has heard of its restart."""
    count = server.log.count(RETURNED.format(role))
    server.children()[role].kill()
    wait_for_return(server, role, count + 1)


@pytest.mark.parametrize(
    "deaths",
    [
        [("scheduler", 20)],
        [("tokenizer", 0)],
        [("tokenizer", 20)],
        [("detokenizer", 20)],
        [("scheduler", 10), ("detokenizer", 30), ("tokenizer", 50), ("scheduler", 80)],
    ],
    ids=lambda deaths: "-".join(f"{role}{tokens}" for role, tokens in deaths),
)
def test_streams_go_on_as_if_nothing_had_happened(
    server: Server, undisturbed: list[dict[int, dict[str, Any]]], deaths: list[tuple[str, int]]
) -> None:
    assert requests.post(f"{server.url}/flush_cache?timeout=30", timeout=WAIT_S).status_code == 200
    before = restarts(server)
    streams = [Stream(server.url, body) for body in BODIES]
    for role, tokens in deaths:
        streams[0].reach(tokens)
        kill(server, role)
    assert_same([stream.answers() for stream in streams], undisturbed)
    assert requests.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200
    killed = [role for role, _ in deaths]
    assert restarts(server) == {role: count + killed.count(role) for role, count in before.items()}


def test_deterministic_streams_go_on_with_the_same_bits(launch: Callable[..., Server]) -> None:
    server = launch("--model-path", "demo", "--enable-deterministic-inference", "--dtype", "bfloat16", standby=True)
    before = [stream.answers() for stream in [Stream(server.url, body) for body in BODIES]]
    streams = [Stream(server.url, body) for body in reversed(BODIES)]
    for tokens in (20, 60):
        streams[-1].reach(tokens)
        kill(server, "scheduler")
    assert [stream.answers() for stream in reversed(streams)] == before


def wait_for_return(server: Server, role: str, count: int = 1) -> None:
    """Until the gateway has heard of the restart for the count-th time."""
    deadline = time.monotonic() + WAIT_S
    while server.log.count(RETURNED.format(role)) < count:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.01)


def test_openai_clients_notice_nothing(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    question: Any = {"model": "demo", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    expected = client.chat.completions.create(**question, temperature=0, max_tokens=60)
    chunks = client.chat.completions.create(**question, temperature=0, max_tokens=60, stream=True)
    text = next(chunks).choices[0].delta.content or ""
    kill(server, "scheduler")
    text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected.choices[0].message.content


def test_embeddings_arrive_though_the_scheduler_dies(launch: Callable[..., Server]) -> None:
    server = launch("--model-path", "demo", "--is-embedding", *FLAGS, standby=True)
    texts = [f"sentence number {number}" for number in range(40)]
    ask = lambda: requests.post(f"{server.url}/encode", json={"text": texts}, timeout=WAIT_S).json()  # noqa: E731
    expected = [item["embedding"] for item in ask()]
    requests.post(f"{server.url}/slow_down", json={"forward_sleep_time": 0.5}, timeout=WAIT_S)
    found: list[Any] = []
    caller = threading.Thread(target=lambda: found.extend(ask()))
    caller.start()
    server.wait_for("Prefill batch")
    server.children()["scheduler"].kill()
    caller.join(WAIT_S)
    for item, vector in zip(found, expected, strict=True):
        assert item["embedding"] == pytest.approx(vector, abs=1e-4), "other batches round otherwise"


# the culprit


def test_a_request_that_ends_the_scheduler_each_time_fails_alone(deadly: Server, quick: Server) -> None:
    died = deadly.log.count("was killed by SIGSEGV")
    asked = [body(f"stream {number}", sampling_seed=number, max_new_tokens=150) for number in range(8)]
    streams = [Stream(deadly.url, one) for one in asked]
    for stream in streams:
        stream.reach(20)
    culprit = {"input_ids": [77, 5, 6], "sampling_params": {"max_new_tokens": 5}}
    answer = requests.post(f"{deadly.url}/generate", json=culprit, timeout=WAIT_S)
    assert answer.status_code == 500
    assert "The scheduler ended each time it served this request" in answer.text
    found = [stream.answers()[0] for stream in streams]
    assert found == [Stream(quick.url, one).answers()[0] for one in asked]
    assert deadly.log.count("was killed by SIGSEGV") == died + 3
    again = requests.post(f"{deadly.url}/generate", json=culprit, timeout=WAIT_S)
    assert again.status_code == 500 and "it is not tried for ten minutes" in again.text
    assert deadly.log.count("was killed by SIGSEGV") == died + 3


def test_two_such_requests_at_once_fail_and_the_server_lives(deadly: Server) -> None:
    stream = Stream(deadly.url, body("stream", sampling_seed=1, max_new_tokens=150))
    stream.reach(20)
    found: list[int] = []

    def ask(last: int) -> None:
        culprit = {"input_ids": [77, 6, last], "sampling_params": {"max_new_tokens": 5}}
        found.append(requests.post(f"{deadly.url}/generate", json=culprit, timeout=WAIT_S).status_code)

    callers = [threading.Thread(target=ask, args=(last,)) for last in (6, 7)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT_S)
    assert found == [500, 500]
    assert stream.answers()[0]["completion_tokens"] == 150


# the scheduler's state


def test_the_weights_that_were_committed_last_serve_again(launch: Callable[..., Server], tmp_path: Path) -> None:
    first, second = (checkpoints.version_model(tmp_path / name, token) for name, token in (("a", 11), ("b", 12)))
    server = launch("--model-path", str(first), "--skip-tokenizer-init", "--dtype", "float32")
    update = {"model_path": str(second), "weight_version": "second"}
    assert requests.post(f"{server.url}/update_weights_from_disk", json=update, timeout=WAIT_S).json()["success"]
    kill(server, "scheduler")
    asked = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}
    said = requests.post(f"{server.url}/generate", json=asked, timeout=WAIT_S).json()
    assert (said["output_ids"], said["meta_info"]["weight_version"]) == ([12] * 4, "second")
    assert requests.get(f"{server.url}/model_info", timeout=WAIT_S).json()["weight_version"] == "second"


def test_a_pause_outlasts_the_scheduler_and_the_gateway(server: Server) -> None:
    stream = Stream(server.url, BODIES[0])
    stream.reach(10)
    requests.post(f"{server.url}/pause_generation", json={"mode": "in_place"}, timeout=WAIT_S)
    made = stream.made
    kill(server, "scheduler")
    assert requests.get(f"{server.url}/readyz", timeout=WAIT_S).status_code == 503
    assert stream.made <= made + 1  # what was on its way
    requests.post(f"{server.url}/continue_generation", json={}, timeout=WAIT_S)
    assert stream.answers()[0]["completion_tokens"] == LENGTH


def test_a_gateway_that_died_serves_again_on_the_same_port(server: Server) -> None:
    url = server.url
    stream = Stream(url, {**body("Hello", temperature=0), "rid": "mine"})
    stream.reach(5)
    requests.post(f"{url}/pause_generation", json={"mode": "in_place"}, timeout=WAIT_S)
    server.children()["gateway"].kill()
    stream.join(WAIT_S)
    assert stream.error is not None  # its connection ended with the process
    assert requests.get(f"{url}/readyz", timeout=WAIT_S).status_code == 503  # it is told of the pause
    requests.post(f"{url}/continue_generation", json={}, timeout=WAIT_S)
    again = Stream(url, {**body("Hello", temperature=0), "rid": "mine"})
    assert again.answers()[0]["completion_tokens"] == LENGTH
    load = requests.get(f"{url}/get_server_info", timeout=WAIT_S).json()["internal_states"][0]
    assert load["num_running_reqs"] == 0  # the old one's is gone


def test_a_command_that_the_scheduler_takes_to_its_grave_is_answered(server: Server) -> None:
    requests.post(f"{server.url}/slow_down", json={"forward_sleep_time": 0.2}, timeout=WAIT_S).raise_for_status()
    stream = Stream(server.url, body("Hello", temperature=0))
    stream.reach(5)
    answers: list[requests.Response] = []
    flush = threading.Thread(
        target=lambda: answers.append(requests.post(f"{server.url}/flush_cache?timeout=100", timeout=WAIT_S))
    )
    flush.start()  # it waits for the stream, which is slow until its scheduler dies
    while IN_PROGRESS not in requests.post(f"{server.url}/flush_cache", timeout=WAIT_S).text:
        assert flush.is_alive()
    kill(server, "scheduler")
    flush.join(WAIT_S)
    assert answers[0].status_code == 503
    assert "started again" in answers[0].text
    stream.answers()


# a scheduler that does not move


def test_a_scheduler_that_hangs_is_replaced_and_its_streams_go_on(
    launch: Callable[..., Server], undisturbed: list[dict[int, dict[str, Any]]]
) -> None:
    server = launch("--model-path", "demo", "--watchdog-timeout", "3", *FLAGS, standby=True)
    stream = Stream(server.url, BODIES[0])
    stream.reach(20)
    server.children()["scheduler"].send_signal(signal.SIGSTOP)
    server.wait_for("has not moved for 3 s (--watchdog-timeout)")
    wait_for_return(server, "scheduler")
    assert_same(stream.answers(), undisturbed[0])


@pytest.mark.parametrize("role", ["tokenizer", "detokenizer"])
def test_a_text_service_that_hangs_is_replaced_and_streams_go_on(watched: Server, role: str) -> None:
    start, count = len(watched.log), watched.log.count(RETURNED.format(role))
    stream = Stream(watched.url, body("stream", sampling_seed=1, max_new_tokens=60))
    stream.reach(5)
    watched.children()[role].send_signal(signal.SIGSTOP)
    watched.wait_for_match(rf"The {role} \(pid", start)
    wait_for_return(watched, role, count + 1)
    late = Stream(watched.url, body("stream", sampling_seed=1, max_new_tokens=60))
    assert stream.answers() == late.answers()


def test_a_gateway_that_hangs_is_replaced(watched: Server) -> None:
    start = len(watched.log)
    watched.children()["gateway"].send_signal(signal.SIGSTOP)
    watched.wait_for_match("The gateway serves again", start, timeout_s=60)
    stream = Stream(watched.url, body("stream", sampling_seed=1, max_new_tokens=5))
    assert stream.answers()[0]["completion_tokens"] == 5


def test_a_new_gateway_counts_its_own_restart_and_those_before_it(quick: Server) -> None:
    before, start = restarts(quick), len(quick.log)
    for role in ("detokenizer", "gateway"):
        quick.children()[role].kill()
        quick.wait_for_match(f"The {role} serves again", start, timeout_s=60)
    assert restarts(quick) == {
        "gateway": before["gateway"] + 1,
        "tokenizer": before["tokenizer"],
        "scheduler": before["scheduler"],
        "detokenizer": before["detokenizer"] + 1,
    }


def test_a_server_that_was_stopped_as_a_whole_goes_on_as_it_was(watched: Server) -> None:
    """As a debugger, a cgroup freezer or a laptop that sleeps stop it."""
    before, start = watched.children(), len(watched.log)
    stream = Stream(watched.url, body("stream", sampling_seed=1, max_new_tokens=60))
    stream.reach(5)
    processes = [psutil.Process(watched.process.pid), *before.values()]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    for process in reversed(processes):
        process.send_signal(signal.SIGCONT)
    assert stream.answers()[0]["completion_tokens"] == 60
    time.sleep(2)
    after = watched.children()
    assert all(after[role].pid == before[role].pid for role in ROLES)
    assert "killing it" not in watched.log[start:]


def test_an_idle_scheduler_is_not_taken_for_hung(watched: Server) -> None:
    start = len(watched.log)
    time.sleep(5)
    assert "has not moved" not in watched.log[start:]
    stream = Stream(watched.url, body("stream", sampling_seed=1, max_new_tokens=5))
    assert stream.answers()[0]["completion_tokens"] == 5


# draining


def test_a_death_while_draining_loses_nothing(launch: Callable[..., Server]) -> None:
    server = launch("--model-path", "demo", *FLAGS)
    stream = Stream(server.url, BODIES[0])
    stream.reach(5)
    server.signal()
    server.wait_for("Draining")
    server.children()["scheduler"].kill()
    assert stream.answers()[0]["completion_tokens"] == LENGTH
    assert server.wait() == ExitStatus.CLEAN


# many deaths


def deaths_of_all() -> Iterator[str]:
    return itertools.cycle(["scheduler", "detokenizer", "tokenizer"])


@pytest.mark.slow
def test_many_requests_and_many_deaths(launch_fake: Callable[..., Server], quick: Server) -> None:
    """64 streams on a scheduler without a model, whose tokens are a function of the prompt; deaths without pause."""
    server = launch_fake(*MANY, environment={"QUARTET_FAKE_STEP_S": "0.01"}, standby=True)
    asked = [body(f"stream {number}", sampling_seed=number, max_new_tokens=400) for number in range(64)]
    streams = [Stream(server.url, one) for one in asked]
    for role in itertools.islice(deaths_of_all(), 9):
        time.sleep(0.5)
        children = server.children()
        if role in children:
            children[role].kill()
    found = [stream.answers()[0] for stream in streams]
    expected = [Stream(quick.url, one).answers()[0] for one in asked]
    assert found == expected
