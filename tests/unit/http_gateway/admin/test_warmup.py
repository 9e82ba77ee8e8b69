"""The warm-up request."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from quartet.http_gateway.admin import warmup
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError


class Recorder(BaseHTTPRequestHandler):
    """Answers everything with the server's status and notes what was asked."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.command, self.path, self.headers.get("authorization"), body))  # type: ignore[attr-defined]
        status = 200 if self.command == "GET" else self.server.post_status  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"because")

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Recorder)
    server.asked, server.post_status = [], 200  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_it_waits_for_the_model_info_and_generates_once_with_the_key(server: HTTPServer) -> None:
    warmup.warm_up(ServerConfig(api_key="k"), "0.0.0.0", server.server_port)
    get, post = server.asked  # type: ignore[attr-defined]
    assert get == ("GET", "/get_model_info", "Bearer k", b"")
    assert post[:3] == ("POST", "/generate", "Bearer k")
    assert b'"The capital city of France is"' in post[3] and b'"max_new_tokens":8' in post[3]


def test_a_key_may_have_any_characters(server: HTTPServer) -> None:
    warmup.warm_up(ServerConfig(api_key="ключ"), "0.0.0.0", server.server_port)
    assert [asked[2].encode("latin-1").decode() for asked in server.asked] == ["Bearer ключ"] * 2  # type: ignore[attr-defined]


def test_an_answer_other_than_200_stops_the_start(server: HTTPServer) -> None:
    server.post_status = 500  # type: ignore[attr-defined]
    with pytest.raises(StartupError, match=r"warmup error: /generate answered 500: because"):
        warmup.warm_up(ServerConfig(), "127.0.0.1", server.server_port)


def test_nobody_there_stops_the_start() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(StartupError, match="Initialization failed"):
            warmup.warm_up(ServerConfig(), "127.0.0.1", unused.getsockname()[1], tries=1)


@pytest.mark.parametrize(
    ("settings", "path", "prompt"),
    [
        ({}, "/generate", "text"),
        ({"skip_tokenizer_init": True}, "/generate", "input_ids"),
        ({"is_embedding": True}, "/encode", "text"),
    ],
)
def test_what_is_asked_depends_on_the_model(settings: dict[str, bool], path: str, prompt: str) -> None:
    asked, body = warmup.request(ServerConfig(**settings))
    assert (asked, next(iter(body))) == (path, prompt)
