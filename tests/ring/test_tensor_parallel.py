"""One model computed by two ranks: answers, what is refused, and the death of either rank under streams."""

from collections.abc import Iterator

import psutil
import pytest
import requests

from tests.ring.test_recovery import BODIES, FLAGS, Stream, assert_same, wait_for_return
from tests.servers import Server, command_line, launched

WAIT_S = 60


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with launched("--model-path", "demo", "--tp-size", "2", "--device", "cpu", *FLAGS) as server:
        yield server


def rank(server: Server, number: int) -> psutil.Process:
    """The process of a rank; those after the first are children of the first."""
    first = server.children()["scheduler TP0"]
    if not number:
        return first
    return next(child for child in first.children() if command_line(child)[:1] == [f"quartet::scheduler TP{number}"])


def test_the_start_says_how_the_ranks_have_met(server: Server) -> None:
    assert server.log.count("Init torch distributed begin.") == 2
    assert "Init torch distributed ends. rank=1 of 2" in server.log
    assert requests.get(f"{server.url}/get_server_info", timeout=WAIT_S).json()["tp_size"] == 2


def test_commands_that_only_one_process_can_follow_are_refused(server: Server) -> None:
    for route, body in [
        ("update_weights_from_disk", {"model_path": "demo"}),
        ("release_memory_occupation", {}),
    ]:
        answer = requests.post(f"{server.url}/{route}", json=body, timeout=WAIT_S)
        assert answer.status_code == 400, (route, answer.text)
    assert requests.post(f"{server.url}/flush_cache", timeout=WAIT_S).status_code == 200


def test_streams_go_on_when_either_rank_is_killed(server: Server) -> None:
    before = [stream.answers() for stream in [Stream(server.url, body) for body in BODIES]]
    for count, number in enumerate((1, 0), 1):
        streams = [Stream(server.url, body) for body in BODIES]
        streams[0].reach(20)
        rank(server, number).kill()
        wait_for_return(server, "scheduler", count)
        assert_same([stream.answers() for stream in streams], before)
    assert requests.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200
    assert server.log.count("Ending the group.") >= 1
