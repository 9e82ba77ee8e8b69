"""The server seen from a trainer: start one, or take one that runs; rollouts out of it, weights into it."""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quartet.runtime.model_files.model_info import local_path

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30
ANSWER_TIMEOUT_S = 300
LOOK_EVERY_S = 0.1
ADDRESS = re.compile(r"is served at (http://\S+)\. Try:")


class Server:
    """A Quartet server at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """POST a body, or GET without one; the decoded answer. Ends the program when the server refuses."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path} answered {error.code}: {error.read().decode()}") from error

    def model_directory(self) -> str:
        """Where the served weights are; a trainer on another machine would be told."""
        return str(local_path(self.call("/get_model_info")["model_path"]))


@contextlib.contextmanager
def started(model_path: str, log: Path, *flags: str) -> Iterator[Server]:
    """A server of our own on a free port, stopped at the end.

    It computes in float32 like the trainer, so that the logprobs of the two can be compared closely.
    """
    command = [sys.executable, "-m", "quartet.launch_server", "--model-path", model_path]
    with log.open("w") as lines:
        process = subprocess.Popen([*command, "--port", "0", "--dtype", "float32", *flags], stdout=lines, stderr=lines)
    try:
        yield Server(address(process, log))
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Where a server that has just been started serves, once it does."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if found := ADDRESS.search(log.read_text()):
            return found[1]
        if process.poll() is not None:
            raise SystemExit(f"the server ended at start:\n{log.read_text()}")
        time.sleep(LOOK_EVERY_S)
    raise SystemExit(f"the server was not ready in {START_TIMEOUT_S} s; see {log}")
