"""The configurations of deploy/proxy with the real nginx and HAProxy, where they are installed."""

import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.servers import ROOT, Server

WAIT_S = 60
PLACES = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"
PROXIES = {name: shutil.which(name) or shutil.which(name, path=PLACES) for name in ("nginx", "haproxy")}
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
OF_NGINX = """pid {directory}/pid; error_log {directory}/error.log; daemon off; master_process off;
"""
PATHS_OF_NGINX = """http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lasting(launch_for_module: Callable[..., Server]) -> Server:
    return start(launch_for_module)


def start(launch: Callable[..., Server]) -> Server:
    """A server that gives fifty tokens a second."""
    fake = {"scheduler": "tests.fake_scheduler"}
    return launch("--model-path", "demo", services=fake, environment={"QUARTET_FAKE_STEP_S": "0.02"})


@pytest.fixture(params=["nginx", "haproxy"])
def proxied(
    request: pytest.FixtureRequest, launch: Callable[..., Server], lasting: Server, tmp_path: Path
) -> Iterator[tuple[str, Server]]:
    """The address of the proxy before two servers, and the second of them."""
    program = PROXIES[request.param]
    if program is None:
        pytest.skip(f"{request.param} is not installed here (Debian: {request.param})")
    second = start(launch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (ROOT / "deploy" / "proxy" / FILES[request.param]).read_text()
    text = text.replace(":30000", f":{lasting.port}").replace(":30001", f":{second.port}")
    text = text.replace("listen 8000", f"listen 127.0.0.1:{port}").replace("bind :8000", f"bind 127.0.0.1:{port}")
    if request.param == "nginx":
        text = OF_NGINX.format(directory=tmp_path) + text.replace("http {\n", PATHS_OF_NGINX.format(directory=tmp_path))
    file = tmp_path / FILES[request.param]
    file.write_text(text)
    arguments = ["-p", str(tmp_path), "-c", str(file)] if request.param == "nginx" else ["-f", str(file)]
    process = subprocess.Popen([program, *arguments])
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + WAIT_S
        while not answers(url):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield url, second
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/livez", timeout=1).status_code == 200
    except requests.RequestException:
        return False


def opened(url: str, tokens: int) -> http.client.HTTPConnection:
    """A connection on which a stream was asked for."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=WAIT_S)
    params = {"max_new_tokens": tokens, "ignore_eos": True}
    body = json.dumps({"text": "hi", "stream": True, "sampling_params": params})
    connection.request("POST", "/generate", body, {"content-type": "application/json"})
    return connection


def test_streams_pass_token_by_token_and_servers_that_leave_are_left_out(proxied: tuple[str, Server]) -> None:
    url, second = proxied
    connection = opened(url, 400)
    answer = connection.getresponse()
    text = b""
    while b"\n\n" not in text:
        text += answer.read1(1 << 16)
    assert text.count(b"data: ") < 20  # of four hundred; a buffer would have held back what fills it
    connection.close()
    streams = [opened(url, 50) for _ in range(4)]
    begun = [stream.getresponse() for stream in streams]
    second.signal()  # it drains
    params = {"max_new_tokens": 2}
    for _ in range(8):
        late = requests.post(f"{url}/generate", json={"text": "hi", "sampling_params": params}, timeout=WAIT_S)
        assert late.status_code == 200, late.text
    for answer in begun:
        assert answer.read().endswith(b"data: [DONE]\n\n")
    assert second.wait() == 0
    for _ in range(8):
        late = requests.post(f"{url}/generate", json={"text": "hi", "sampling_params": params}, timeout=WAIT_S)
        assert late.status_code == 200, late.text
