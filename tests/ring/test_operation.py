"""What operators ask of a server: TLS with client certificates, a Unix socket, a ready file, logs for machines."""

import http.client
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from tests.certificates import Certificates
from tests.collector import collecting
from tests.servers import ROOT, Server, launched

pytestmark = pytest.mark.slow


SAMPLING = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server(files: Certificates) -> Iterator[Server]:
    """One with all of it."""
    directory = files.directory
    flags = ["--ssl-certfile", files["server.pem"], "--ssl-keyfile", files["server.key"]]
    flags += ["--ssl-ca-certs", files["ca.pem"], "--uds", f"{directory}/http.sock", "--ready-file", files["ready"]]
    flags += ["--log-format", "json", "--log-requests", "full"]
    with launched(*flags, ready=False) as server:
        server.wait_for("is served at")
        yield server


def url(files: Certificates) -> str:
    return Path(files["ready"]).read_text().splitlines()[0]


def client(files: Certificates, *certificate: str) -> httpx.Client:
    context = ssl.create_default_context(cafile=files["ca.pem"])
    if certificate:
        context.load_cert_chain(*certificate)
    return httpx.Client(verify=context, base_url=url(files), timeout=60)


def test_the_ready_file_says_the_addresses_of_a_server_on_any_free_port(server: Server, files: Certificates) -> None:
    tcp, unix = Path(files["ready"]).read_text().splitlines()
    assert tcp.startswith("https://127.0.0.1:") and not tcp.endswith(":0")
    assert unix == f"unix:{files['http.sock']}"


def test_a_client_with_a_certificate_is_served_and_one_without_is_not(server: Server, files: Certificates) -> None:
    with client(files, files["client.pem"], files["client.key"]) as known:
        sampling = {"max_new_tokens": 4, "ignore_eos": True}
        answer = known.post("/generate", json={"text": "Hello", "rid": "by-tls", "sampling_params": sampling})
        assert (answer.status_code, answer.json()["meta_info"]["completion_tokens"]) == (200, 4)
        assert known.get("/health").status_code == 200
    with client(files) as stranger, pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
        stranger.get("/health")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the old version that is tried
def test_tls_1_1_and_plain_http_are_refused(server: Server, files: Certificates) -> None:
    host, port = url(files).removeprefix("https://").split(":")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError), socket.create_connection((host, int(port)), 10) as raw, old.wrap_socket(raw):
        pass
    plain = http.client.HTTPConnection(host, int(port), timeout=120)
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.request("GET", "/health")
        plain.getresponse()


def test_the_unix_socket_streams_and_is_private(server: Server, files: Certificates) -> None:
    assert Path(files["http.sock"]).lstat().st_mode & 0o777 == 0o600
    transport = httpx.HTTPTransport(uds=files["http.sock"])
    with httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as near:
        body = {"text": "Hi", "stream": True, "sampling_params": {"max_new_tokens": 3}}
        with near.stream("POST", "/generate", json=body) as answer:
            assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"


def test_a_second_server_on_that_socket_is_refused_with_who(server: Server, files: Certificates) -> None:
    argv = [sys.executable, "-m", "quartet.runtime.cli", "serve", "--port", "0", "--uds", files["http.sock"]]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 64
    [line] = ran.stderr.splitlines()
    assert f"quartet::gateway (pid {server.children()['gateway'].pid}) listens on --uds" in line


def test_every_line_is_json_and_the_request_has_its_own(server: Server, files: Certificates) -> None:
    server.wait_for('"id": "by-tls"')
    entries = [json.loads(line) for line in server.log.splitlines()]
    assert {entry["role"] for entry in entries} >= {"launcher", "gateway", "scheduler", "tokenizer", "detokenizer"}
    [said] = [entry for entry in entries if entry.get("id") == "by-tls"]
    assert (said["route"], said["status"], said["output_tokens"], said["prompts"]) == ("/generate", 200, 4, ["Hello"])
    assert 0 <= said["queue_s"] <= said["first_token_s"] <= said["total_s"]


def test_files_are_gone_when_it_has_stopped(server: Server, files: Certificates) -> None:
    server.signal()
    assert server.wait() == 0
    assert not Path(files["ready"]).exists() and not Path(files["http.sock"]).exists()


def used_by_board_and_alerts() -> set[str]:
    """The metrics that Prometheus's rules and Grafana's board name."""
    places = [ROOT / "deploy/monitoring/alerts.yml", ROOT / "deploy/monitoring/grafana/dashboards/quartet.json"]
    used = {name for place in places for name in re.findall(r"\b(?:sglang|quartet):\w+", place.read_text())}
    assert len(used) > 20
    return used


def test_a_server_without_tcp_is_reached_by_its_socket_alone_traces_each_hop_and_sleeps_when_idle(
    tmp_path: Path,
) -> None:
    with collecting() as collector:
        flags = ["--uds", str(tmp_path / "s"), "--disable-tcp", "--otlp-traces-endpoint", collector.url]
        flags += ["--sleep-when-idle-s", "1"]
        with launched(*flags) as server:
            assert f"is served at unix:{tmp_path}/s. Try:" in server.log
            assert f"curl -s --unix-socket {tmp_path}/s http://localhost/generate" in server.log
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(tmp_path / "s")), timeout=60) as near:
                assert near.get("http://localhost/readyz").status_code == 200
                body = {"text": "Hello", "rid": "traced", "sampling_params": SAMPLING}
                answers = [near.post("http://localhost/generate", json=body).json()["output_ids"]]
                server.wait_for("gave back the memory of weights and KV pool")
                while not (health := near.get("http://localhost/health")).content:  # the gateway is told a moment later
                    assert health.status_code == 200
                    time.sleep(0.01)
                assert health.json()["status"] == "sleeping"
                answers.append(
                    near.post("http://localhost/generate", json=body | {"rid": "woken"}).json()["output_ids"]
                )
                server.wait_for("Took the memory again within")
                metrics = near.get("http://localhost/metrics").text
            server.signal()
            assert server.wait() == 0
    assert answers[0] == answers[1]
    assert used_by_board_and_alerts() - set(re.findall(r"^([a-z]\w*:\w+)", metrics, re.MULTILINE)) == set()
    for role in ("launcher", "gateway", "tokenizer", "scheduler", "detokenizer"):
        assert f'quartet:process_cpu_seconds_total{{role="{role}"}}' in metrics
    hops = [span for span in collector.spans if "traced" in str(span.attributes)]
    assert [span.name for span in hops] == ["tokenizer", "queue", "prefill", "decode", "detokenizer"]
    assert all(before.end_time_unix_nano <= after.start_time_unix_nano for before, after in pairwise(hops))
