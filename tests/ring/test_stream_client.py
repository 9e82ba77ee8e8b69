"""The streaming example against a real ring."""

import socket
import subprocess
import sys

import pytest
import requests

from deploy.examples.stream_client import StreamError, stream
from tests.servers import ROOT, Server

SAMPLING = {"temperature": 1, "max_new_tokens": 20, "sampling_seed": 3}
WAIT_S = 60


@pytest.fixture(scope="module")
def server(launch_for_module) -> Server:
    return launch_for_module(services={"scheduler": "tests.fake_scheduler"})


def test_what_it_prints_is_the_whole_answer(server):
    body = {"text": "Hello", "sampling_params": SAMPLING}
    whole = requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S).json()["text"]
    flags = ["--url", server.url, "--seed", "3", "--max-new-tokens", "20"]
    command = [sys.executable, "-m", "deploy.examples.stream_client", "Hello", *flags]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=True).stdout
    assert printed == whole + "\n"


def test_no_server_is_one_line_that_says_how_to_start_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    command = [sys.executable, "-m", "deploy.examples.stream_client", "Hello", "--url", url]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"no server at {url} (") and line.endswith("; start one with `make serve`")


def test_a_refused_request_says_why(server):
    with pytest.raises(StreamError, match="temperature"):
        next(stream(server.url, {"text": "Hello", "sampling_params": {"temperature": -1}}))
