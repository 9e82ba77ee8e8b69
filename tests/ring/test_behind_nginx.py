"""Streams through a real nginx that buffers and compresses, where one is installed."""

import http.client
import json
import shutil
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import Server

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin") or shutil.which("nginx")
WAIT_S = 60
CONFIG = """
worker_processes 1;
daemon off;
master_process off;
pid {directory}/pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    gzip on;
    gzip_proxied any;
    gzip_min_length 0;
    gzip_types text/event-stream application/json;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{upstream};
            proxy_http_version 1.1;
        }}
    }}
}}
"""

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed here (Debian: nginx-light)")


@pytest.fixture
def proxied(launch_fake: Callable[..., Server], tmp_path: Path) -> Iterator[int]:
    """The port of an nginx before a server that gives twenty tokens a second."""
    server = launch_fake("--model-path", "demo", environment={"QUARTET_FAKE_STEP_S": "0.05"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "nginx.conf").write_text(CONFIG.format(directory=tmp_path, port=port, upstream=server.port))
    assert NGINX
    nginx = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")])
    try:
        while nginx.poll() is None and not listens(port):
            time.sleep(0.02)
        assert nginx.poll() is None, (tmp_path / "error.log").read_text()
        yield port
    finally:
        nginx.kill()
        nginx.wait()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_events_come_one_by_one_though_the_proxy_buffers_and_compresses(proxied: int, path: str) -> None:
    body = {"text": "hi", "stream": True, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
    if path.startswith("/v1"):
        body = {"model": "demo", "prompt": "hi", "stream": True, "max_tokens": 400, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", proxied, timeout=WAIT_S)
    headers = {"content-type": "application/json", "accept-encoding": "gzip", "authorization": "Bearer none"}
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    assert answer.status == 200
    decoder = zlib.decompressobj(31) if answer.getheader("content-encoding") == "gzip" else None
    text = b""
    while b"\n\n" not in text:
        piece = answer.read1(1 << 16)
        assert piece, text
        text += decoder.decompress(piece) if decoder else piece
    assert text.count(b"data: ") < 20  # of four hundred; a buffer would have held back what fills it
    connection.close()
