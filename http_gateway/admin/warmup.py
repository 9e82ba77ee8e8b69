"""The first request of a server, sent to itself over HTTP before it says that it is ready."""

import http.client
import socket
import time
from typing import Any

import msgspec

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError

PROMPT = "The capital city of France is"
PROMPT_IDS = [10, 11, 12]
TRIES = 120
RETRY_S = 1.0
TIMEOUT_S = 600.0
LOCAL = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}


def request(config: ServerConfig) -> tuple[str, dict[str, Any]]:
    """Path and body of the warm-up request."""
    prompt: dict[str, Any] = {"input_ids": PROMPT_IDS} if config.skip_tokenizer_init else {"text": PROMPT}
    if config.is_embedding:
        return "/encode", prompt
    return "/generate", {**prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}


class UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket, by its path."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def warm_up(config: ServerConfig, host: str, port: int, tries: int = TRIES) -> None:
    """Wait until the server answers, then generate once. Blocks: for a thread. Raises StartupError.

    A `host` that is a path, with a slash, is a Unix socket.
    """
    path, body = request(config)
    headers = {"Content-Type": b"application/json"}
    if config.api_key:
        headers["Authorization"] = b"Bearer " + config.api_key.split(",")[0].encode()  # a str would have to be Latin-1
    try:
        wait_for_answer(LOCAL.get(host, host), port, headers, tries)
        status, answer = call(LOCAL.get(host, host), port, "POST", path, headers, TIMEOUT_S, msgspec.json.encode(body))
    except (OSError, http.client.HTTPException) as error:
        raise StartupError(f"Initialization failed. warmup error: {error}") from error
    if status != http.client.OK:
        raise StartupError(f"Initialization failed. warmup error: {path} answered {status}: {answer}")


def wait_for_answer(host: str, port: int, headers: dict[str, bytes], tries: int) -> None:
    """Ask until the server answers. Raises StartupError for an answer other than 200, OSError after the last try."""
    for attempt in range(tries):
        try:
            status, answer = call(host, port, "GET", "/get_model_info", headers, RETRY_S)
        except OSError:
            if attempt == tries - 1:
                raise
        else:
            if status == http.client.OK:
                return
            raise StartupError(f"Initialization failed. warmup error: /get_model_info answered {status}: {answer}")
        time.sleep(RETRY_S)


def call(
    host: str, port: int, method: str, path: str, headers: dict[str, bytes], timeout_s: float, body: bytes | None = None
) -> tuple[int, str]:
    """Status and text of one request."""
    connection = (
        UnixConnection(host, timeout_s) if "/" in host else http.client.HTTPConnection(host, port, timeout=timeout_s)
    )
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()
