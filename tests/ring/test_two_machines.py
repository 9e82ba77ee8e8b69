"""One model computed by two machines, which are network namespaces here: answers, updates, the death of a rank."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from deploy.benchmarks import half_billion
from tests import checkpoints
from tests.ring.test_kv_tier import BLOCK, CACHED, LENGTH, ask, await_files, flags
from tests.ring.test_recovery import BODIES, FLAGS, RETURNED, Stream, assert_same, wait_for_return
from tests.ring.test_tensor_parallel import FIRST, generate, post, version
from tests.servers import Server, launched

SUBNET = f"10.213.{os.getpid() % 250}"
NAMESPACE = f"quartet{os.getpid()}"
NEAR, FAR = f"qn{os.getpid()}"[:15], f"qf{os.getpid()}"[:15]
READY = "The ranks of this machine take part."


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def other_machine() -> Iterator[tuple[str, ...]]:
    """The command that starts programs on it; it is reached at SUBNET.2, and this one from there at SUBNET.1."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip`, which makes network namespaces")
    try:
        ip("netns", "add", NAMESPACE)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    try:
        ip("link", "add", NEAR, "type", "veth", "peer", "name", FAR, "netns", NAMESPACE)
        ip("addr", "add", f"{SUBNET}.1/30", "dev", NEAR)
        ip("link", "set", NEAR, "up")
        ip("-n", NAMESPACE, "addr", "add", f"{SUBNET}.2/30", "dev", FAR)
        ip("-n", NAMESPACE, "link", "set", FAR, "up")
        yield "ip", "netns", "exec", NAMESPACE
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be joined here: {error.stderr.strip()}")
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=False)  # and with it both ends of the link


def test_kv_beyond_the_pool_comes_back_on_both_machines(other_machine: tuple[str, ...], tmp_path: Path) -> None:
    """After an eviction, after the death of a rank and after a restart; each machine has a directory of its own."""
    model, near, far = checkpoints.random_model(tmp_path / "model", 0), tmp_path / "near", tmp_path / "far"
    half_billion.write_tokenizer(model)
    both = ("--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"{SUBNET}.1:29572", "--watchdog-timeout", "60")
    both = (*both, "--enable-hierarchical-cache", "--hicache-ratio", "1")
    first_flags = *flags(model, near), *both, "--node-rank", "0"
    blocks = LENGTH // BLOCK
    with launched(*flags(model, far), *both, "--node-rank", "1", ready=False, before=other_machine) as second:
        with launched(*first_flags) as first:
            second.wait_for(READY)
            answers = [ask(first, number)[0] for number in range(2)]
            for place in (near, far / "rank1"):
                await_files(place, 2 * blocks)
            assert not list(far.glob("[!r]*/*.kv")) and not (near / "rank1").exists()
            assert ask(first, 0) == (answers[0], CACHED), "after an eviction"
            second.children()["scheduler TP1"].kill()
            wait_for_return(first, "scheduler", 1)
            assert ask(first, 1) == (answers[1], CACHED), "another group reads the same files"
            next((far / "rank1").glob("*/*.kv")).unlink()
        with launched(*first_flags) as first:
            again = [ask(first, number) for number in range(2)]
            assert [ids for ids, _ in again] == answers
            least, most = sorted(cached for _, cached in again)
            assert least < CACHED and most == CACHED, "a block of which one machine has no part is computed again"


@dataclass
class Machines:
    first: Server
    second: Server


@pytest.fixture(scope="module")
def machines(other_machine: tuple[str, ...]) -> Iterator[Machines]:
    flags = ("--model-path", "demo", "--device", "cpu", "--tp-size", "2", "--nnodes", "2", *FLAGS)
    flags = (*flags, "--dist-init-addr", f"{SUBNET}.1:29571", "--watchdog-timeout", "10")
    with (
        launched(*flags, "--node-rank", "1", ready=False, before=other_machine) as second,
        launched(*flags, "--node-rank", "0") as first,
    ):
        second.wait_for(READY)
        yield Machines(first, second)


def test_both_machines_take_new_weights(machines: Machines, tmp_path: Path) -> None:
    first = machines.first
    assert "Waiting for 1 ranks on other machines." in first.log
    answer = post(first, "update_weights_from_disk", {"model_path": str(version(tmp_path, FIRST))})
    assert answer.json()["success"], answer.text
    assert generate(first, 3)["output_ids"] == [FIRST] * 3
    refused = post(first, "update_weights_from_tensor", {"serialized_named_tensors": ["QUJD", "QUJD"]})
    assert refused.status_code == 400 and "update the weights from disk" in refused.text
    assert post(first, "update_weights_from_disk", {"model_path": "demo"}).json()["success"]


def test_streams_go_on_when_the_rank_of_another_machine_is_killed(machines: Machines) -> None:
    first, second = machines.first, machines.second
    before = [stream.answers() for stream in [Stream(first.url, body) for body in BODIES[:4]]]
    streams = [Stream(first.url, body) for body in BODIES[:4]]
    streams[0].reach(20)
    second.children()["scheduler TP1"].kill()
    wait_for_return(first, "scheduler", 1)
    assert_same([stream.answers() for stream in streams], before)
    assert "Ending the group." in first.log
    assert requests.get(f"{first.url}/health", timeout=60).status_code == 200


def test_streams_go_on_when_the_rank_of_another_machine_is_stopped(machines: Machines) -> None:
    first, second = machines.first, machines.second
    before = Stream(first.url, BODIES[0]).answers()
    returned = first.log.count(RETURNED.format("scheduler"))
    second.children()["scheduler TP1"].suspend()  # nothing runs meanwhile: nobody waits for this rank
    wait_for_return(first, "scheduler", returned + 1)
    assert Stream(first.url, BODIES[0]).answers() == before
    assert "Ending the group." in first.log and "has not moved for 10 s" in second.log


def test_a_machine_that_stands_still_is_missed_by_the_first(machines: Machines) -> None:
    """Its kernel still answers, so that its connections stay, as when a container is paused."""
    first, second = machines.first, machines.second
    before = Stream(first.url, BODIES[0]).answers()
    returned = first.log.count(RETURNED.format("scheduler"))
    start = len(first.log)
    stopped = [psutil.Process(second.process.pid), *second.children().values()]
    for process in stopped:
        process.suspend()
    first.wait_for_match("Rank 1 on another machine has not answered for", start, timeout_s=120)
    for process in stopped:
        process.resume()
    wait_for_return(first, "scheduler", returned + 1)
    assert Stream(first.url, BODIES[0]).answers() == before
