"""The whole server over HTTP on the loopback: one stream, and many at once."""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.benchmarks import half_billion
from deploy.benchmarks.gpu.setting import Setting

MODEL = "qwen2.5-0.5b"
READY_TIMEOUT_S = 60
END_TIMEOUT_S = 10


def run(setting: Setting) -> None:
    directory = Path(tempfile.mkdtemp(prefix="gpu-once-model-"))
    try:
        (directory / "config.json").write_text(json.dumps(setting.shapes[MODEL]))
        half_billion.write_tokenizer(directory)
        with served(setting, directory) as url:
            measure(setting, url)
    finally:
        shutil.rmtree(directory)


@contextmanager
def served(setting: Setting, directory: Path) -> Iterator[str]:
    """A server on a free port, ended with all that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "quartet.launch_server", "--model-path", str(directory), "--load-format", "dummy"]
    command += [
        "--port",
        str(port),
        "--device",
        setting.device.type,
        "--max-total-tokens",
        str(setting.size(400_000, 4096)),
    ]
    url, begun = f"http://127.0.0.1:{port}", time.perf_counter()
    with (setting.out / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            await_ready(url, process)
            setting.report.figure("server ready, dummy weights made on the CPU", time.perf_counter() - begun, "s")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def await_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: see server.log")
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server did not get ready: see server.log")


def generate(url: str, prompt: list[int], new: int) -> tuple[int, float]:
    """Tokens and seconds of one request."""
    params = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    body = json.dumps({"input_ids": prompt, "sampling_params": params}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    begun = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return int(found["meta_info"]["completion_tokens"]), time.perf_counter() - begun


def measure(setting: Setting, url: str) -> None:
    new, count = setting.size(256, 8), setting.size(64, 4)
    prompts = [[(7 * i + j) % 500 + 1 for j in range(setting.size(200, 12))] for i in range(count)]
    rates = [tokens / taken for tokens, taken in (generate(url, prompts[0], new) for _ in range(4))]
    setting.report.figure(
        f"{MODEL} over HTTP, one request of {new} tokens", statistics.median(rates[1:]), "tok/s", goal=1500
    )
    with ThreadPoolExecutor(count) as pool:
        for repeat in range(2):
            begun = time.perf_counter()
            answers = list(pool.map(lambda prompt: generate(url, prompt, new), prompts))
            rate = sum(tokens for tokens, _ in answers) / (time.perf_counter() - begun)
            setting.report.figure(f"{MODEL} over HTTP, {count} requests at once, run {repeat + 1}", rate, "tok/s")
