"""The comparison with other servers, as far as it goes without them."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.benchmarks import peers
from deploy.benchmarks.peers import LLAMA, LOADS, NATIVE, OPENAI, Load, Trace

SINGLE = Load("one", 1, 10, 0, 3, "decode tok/s")
EVENTS = {
    "/generate": [{"meta_info": {"completion_tokens": n}} for n in (1, 2, 3)],
    "/completion": [{"content": "a"}, {"content": "b"}, {"content": "c"}, {"content": "", "tokens_predicted": 3}],
    "/v1/completions": [*[{"choices": [{"text": "a"}]}] * 3, {"choices": [], "usage": {"completion_tokens": 3}}],
}


class Streams(http.server.BaseHTTPRequestHandler):
    """Answers with three tokens, whatever is asked for."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for event in EVENTS[self.path]:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Nothing is printed for a request."""


@pytest.fixture
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Streams)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("api", [NATIVE, OPENAI, LLAMA], ids=lambda api: api.path)
def test_the_tokens_of_a_stream_are_counted(port: int, api: peers.Api) -> None:
    trace = peers.ask(port, api, [1, 2], 3)
    assert (trace.first_tokens, trace.tokens) == (1, 3)
    assert trace.started < trace.first <= trace.last


@pytest.mark.parametrize("api", [NATIVE, OPENAI, LLAMA], ids=lambda api: api.path)
def test_a_stream_of_another_number_of_tokens_is_a_failure(port: int, api: peers.Api) -> None:
    with pytest.raises(RuntimeError, match="asked for 4 tokens, got 3"):
        peers.ask(port, api, [1, 2], 4)


def test_figures_are_those_of_the_clock() -> None:
    found = peers.figures(SINGLE, [Trace(10.0, 12.0, 14.0, 1, 3)])
    assert found == {"output tok/s": 0.75, "TTFT p50 s": 2.0, "prompt tok/s": 5.0, "decode tok/s": 1.0}


def test_ratios_say_how_many_times_better_the_first_server_is() -> None:
    def run(rate: float, ready_s: float) -> dict[str, dict[str, float]]:
        return {"one": {"decode tok/s": rate}, "start": {"start to ready s": ready_s}}

    visits = {"quartet": [run(20, 5), run(30, 6), run(22, 7)], "other": [run(11, 12)], "failed": []}
    decode, ready = peers.rows(visits, [SINGLE])
    assert decode["medians"] == {"quartet": 22, "other": 11} and decode["ratios"] == {"other": 2}
    assert ready["ratios"] == {"other": 2}
    assert "22" in peers.table([decode, ready], list(visits)) and "(2.00x)" in peers.table([decode], list(visits))


def test_prompts_are_the_same_for_every_server_and_share_what_they_should() -> None:
    (shared,) = [load for load in LOADS if load.shared_tokens]
    prompts = shared.prompts(1)
    assert prompts == shared.prompts(1) != shared.prompts(2)
    assert len({tuple(prompt[:1024]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == shared.requests


def test_a_peer_that_is_not_there_and_one_that_cannot_serve_the_file_say_so() -> None:
    given = peers.parsed(["--vllm", "/no/vllm", "--llama-server", "/no/llama", "--flags", "quartet:--dtype float32"])
    by_name = {peer.name: peer for peer in peers.known_peers(Path("model.gguf"), given)}
    assert by_name["vllm"].missing == "serves no GGUF file here"
    assert by_name["llama.cpp model"].missing == "/no/llama is not there"
    assert by_name["quartet"].command.endswith(" --dtype float32")
    directory = {peer.name: peer for peer in peers.known_peers(Path("model"), given)}
    assert directory["vllm"].missing == "/no/vllm is not there"
    assert directory["llama.cpp"].missing == "--llama-files names no GGUF file of the model"
