"""The commands that talk to a running server: chat at a real terminal and in a pipe, health, bench."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import requests

from tests.servers import ROOT, Server

WAIT_S = 60
COMMAND = [sys.executable, "-m", "quartet.runtime.cli"]
PROMPT = ">"
REQUESTS = "sglang:num_requests_total"  # that have ended
STEP_S = "0.02"  # a token of the stand-in model, so that an answer can be stopped


@pytest.fixture(scope="module")
def server(launch_for_module) -> Server:
    services = {"scheduler": "tests.fake_scheduler"}
    flags = ("--preferred-sampling-params", '{"ignore_eos": true, "sampling_seed": 1}')  # no answer ends by chance
    return launch_for_module(*flags, services=services, environment={"QUARTET_FAKE_STEP_S": STEP_S})


class Terminal:
    """A command at a terminal of its own, and everything that this shows."""

    def __init__(self, *arguments: str) -> None:
        self._end, inner = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONPATH": str(ROOT)},
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C becomes a signal
        )
        os.close(inner)

    def press(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait_for(self, pattern: str) -> None:
        """Read until the terminal shows it, behind all that was waited for before; then forget what came."""
        deadline = time.monotonic() + WAIT_S
        while not (found := re.search(pattern, self.shown)):
            readable, _, _ = select.select([self._end], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"no {pattern!r} in {self.shown!r}"
            self.shown += self._read()
        self.shown = self.shown[found.end() :]

    def _read(self) -> str:
        with contextlib.suppress(OSError):  # the command has ended
            if data := os.read(self._end, 65536):
                return data.decode(errors="replace")
        raise AssertionError(f"the command ended: {self.shown!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(server) -> Iterator[Terminal]:
    opened = Terminal("chat", "--url", server.url, "--max-tokens", "12", "--temperature", "0")
    yield opened
    opened.close()


def run(
    *arguments: str, text: str = "", environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """A command that has ended, with `text` piped in."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=os.environ | dict(environment),
        input=text,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def running_requests(server: Server) -> int:
    return int(requests.get(f"{server.url}/v1/loads", timeout=WAIT_S).json()["loads"][0]["num_running_reqs"])


def test_a_chat_at_a_terminal_answers_obeys_and_ends(terminal):
    terminal.wait_for("Ctrl-D ends")
    terminal.wait_for(PROMPT)
    terminal.press("One\x1b\rtwo\r")  # Alt-Enter within the message, Enter behind it
    terminal.wait_for(r"[1-9]\d* tokens?, [\d.]+ tokens/s, first after")
    terminal.wait_for(PROMPT)
    terminal.press("/reset\r")
    terminal.wait_for("the conversation is forgotten")
    terminal.wait_for(PROMPT)
    terminal.press("\x04")
    assert terminal.process.wait(WAIT_S) == 0


def test_ctrl_c_stops_the_answer_alone_and_frees_the_request(server):
    terminal = Terminal("chat", "--url", server.url, "--max-tokens", "2000")
    try:
        terminal.wait_for(PROMPT)
        terminal.press("Tell me everything.\r")
        deadline = time.monotonic() + WAIT_S
        while not running_requests(server):
            assert time.monotonic() < deadline
        terminal.press("\x03")
        terminal.wait_for("stopped")
        while running_requests(server):
            assert time.monotonic() < deadline
        terminal.wait_for(PROMPT)
        terminal.press("/help\r")
        terminal.wait_for("stops an answer")
        terminal.wait_for(PROMPT)
        terminal.press("\x04")
        assert terminal.process.wait(WAIT_S) == 0
    finally:
        terminal.close()


def test_what_is_piped_in_is_one_message_and_the_answer_alone_comes_out(server):
    before = counted(server, REQUESTS)
    ran = run("chat", "--url", server.url, "--max-tokens", "8", text="Hello\nthere\n")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.strip() and ran.stdout.endswith("\n") and "\x1b" not in ran.stdout
    assert counted(server, REQUESTS) == before + 1


def test_a_chat_without_a_server_starts_one_and_leaves_nothing_behind(tmp_path):
    flags = ["--temperature", "0", "--", "--log-level", "warning"]  # flags: a server that runs here is not used
    ran = run("chat", *flags, text="What is the capital of Kenya?", environment={"TMPDIR": str(tmp_path)})
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "The capital of Kenya is Nairobi.\n", "")
    assert list(tmp_path.iterdir()) == []


def test_health_has_a_line_for_each_process_and_its_status_tells(server):
    ran = run("health", server.url)
    first, *processes = ran.stdout.splitlines()
    assert (ran.returncode, first) == (0, f"{server.url} is healthy")
    assert [line.split()[:2] for line in processes] == [
        [role, "runs,"] for role in ("gateway", "tokenizer", "scheduler", "detokenizer")
    ]
    assert run("health", "http://127.0.0.1:1").returncode == 1


def test_a_bench_counts_what_the_server_reports_and_writes_it_down(server, tmp_path):
    target = tmp_path / "result.json"
    load = ["--requests", "6", "--output-len", "5", "--input-len", "20", "--warmup", "1", "--slo", "e2e=60"]
    ran = run("bench", "--compare", server.url, server.url, "--api", "openai", *load, "--json", str(target))
    assert ran.returncode == 0, ran.stderr
    result = json.loads(target.read_text())
    assert [result[side]["completed"] for side in ("first", "second")] == [12, 12]
    assert result["first"]["completion_tokens"] == result["second"]["completion_tokens"] == 60
    assert result["first"]["prompt_tokens"] == 240
    assert result["first"]["good"] == 12
    assert "second / first" in ran.stdout


def test_ctrl_c_has_a_bench_print_what_was_measured(server, tmp_path):
    target = Path(tmp_path / "result.json")
    load = ["--requests", "100000", "--output-len", "2", "--input-len", "4", "--json", str(target)]
    process = subprocess.Popen(
        [*COMMAND, "bench", "--url", server.url, *load], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + WAIT_S
    before = counted(server, REQUESTS)
    while counted(server, REQUESTS) < before + 20:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "interrupted" in shown
    assert json.loads(target.read_text())["summary"]["completed"] > 0


def counted(server: Server, name: str) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=WAIT_S).text
    found = re.search(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0
