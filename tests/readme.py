"""The README's commands: what it prints of each, and a session that runs them as they are printed.

    python -m tests.readme OUT.json     # in namespaces of its own: see `sandboxed`

In the README a line that begins with `$ ` in an indented block is a command, and what follows it is what it printed.
In that text "…" stands for anything, and so do ids, times and process ids.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PROMPT = "$ "
READY = "The server is fired up and ready to roll!"
BLOCK_S = 120
NAMESPACES = ["--net", "--pid", "--fork", "--mount-proc", "--kill-child"]  # its own port 30000, its own processes
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

VARIABLE = [  # what differs between two runs, in printed text without blanks
    (r'"(id|request_id)":"[^"]*"', r'"\1":"…"'),
    (r'"(created|created_at|completed_at)":[0-9]+', r'"\1":…'),
    (r'"e2e_latency":[0-9.]+', '"e2e_latency":…'),
    (r"\[[0-9:]{8}\]|\[[0-9-]{10}[0-9:]{8}\]", "[…]"),
    (r"pid[0-9]+", "pid…"),
    (r"after[0-9.]+s", "after…s"),
    (r"[0-9]+(quartet::)", r"…\1"),
]
LOG_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] ")
MENTIONED = ("quartet ", "QUARTET_")
VARIABLE_SET = re.compile(r"[A-Z_]+=")
REMARK = re.compile(r" {2,}# .*")  # the README's own, behind what was printed


class Example(NamedTuple):
    """A command of the README, and what is printed below it."""

    command: str
    output: str


def blocks(text: str) -> list[list[str]]:
    """The indented blocks of a Markdown text: their lines without the indentation, comments not removed."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("    "):
            found[-1].append(line[4:])
        elif line.strip() or not found[-1]:
            found.append([])
        else:
            found[-1].append("")
    return [block for block in found if any(line.strip() for line in block)]


def complete(command: str) -> bool:
    """Whether the shell would run it as it is: no quotation is open, and no line continues."""
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return not command.rstrip().endswith("\\")


def examples(block: list[str]) -> Iterator[Example]:
    """The commands of a block in order. Raises ValueError where a quotation is not closed."""
    command, output = "", []
    for line in [*block, PROMPT]:
        if command and not complete(command):
            command += "\n" + line
        elif line.startswith(PROMPT):
            if command:
                yield Example(command, "\n".join(output).strip())
            command, output = line.removeprefix(PROMPT), []
        elif not LOG_LINE.match(line):
            output.append(line)


def mentioned(text: str) -> list[list[str]]:
    """The words of each `quartet` command that is named but not run, because it needs the hub, say."""
    found = []
    for block in blocks(text):
        for line in block:
            words = shlex.split(line.replace("…", "x"), comments=True) if line.lstrip().startswith(MENTIONED) else []
            while words and VARIABLE_SET.match(words[0]):
                del words[0]
            if words[:1] == ["quartet"]:
                found.append(words)
    return found


def log_lines(text: str) -> list[str]:
    """The lines of a server's log that a Markdown text shows."""
    return [line for block in blocks(text) for line in block if LOG_LINE.match(line)]


def comparable(text: str) -> str:
    """Printed text without blanks, and with "…" for what differs from run to run."""
    text = re.sub(r"\s+", "", text)
    for pattern, mark in VARIABLE:
        text = re.sub(pattern, mark, text)
    return text


def agrees(printed: str, output: str) -> bool:
    """Whether the README's text, with or without its remarks, describes this output."""
    return describes(printed, output) or describes(REMARK.sub("", printed), output)


def describes(printed: str, output: str) -> bool:
    parts = [re.escape(part) for part in comparable(printed).split("…")]
    return re.search(".*?".join(parts), comparable(output)) is not None


class Tour(NamedTuple):
    """What a session of the README's commands printed."""

    outputs: list[str]  # of each block with commands, in order
    log: str  # the server's


def tours(text: str) -> list[list[Example]]:
    """The blocks that a session runs: those with commands, but for benchmarks, whose output belongs to a machine."""
    found = [list(examples(block)) for block in blocks(text) if any(line.startswith(PROMPT) for line in block)]
    return [block for block in found if not any("deploy.benchmarks" in example.command for example in block)]


def sandboxed(arguments: list[str]) -> list[str] | None:
    """The command that runs `arguments` with a network and processes of its own; None where that is not allowed."""
    if shutil.which("unshare") is None:
        return None
    for extra in ([], ["--user", "--map-root-user"]):
        prefix = ["unshare", *extra, *NAMESPACES]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return [*prefix, *arguments]
    return None


def start_loopback() -> None:
    """In a new network namespace: make 127.0.0.1 work."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plug:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(plug, SIOCGIFFLAGS, request))
        fcntl.ioctl(plug, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def run_tour(text: str) -> Tour:
    """Start a server as the README says, and run each block of commands as one shell would."""
    runs = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "XDG_RUNTIME_DIR": str(runs), "PYTHONPATH": str(ROOT)}
    log = runs / "server.log"
    with log.open("w") as sink:
        server = subprocess.Popen(["quartet", "serve"], cwd=ROOT, env=environment, stdout=sink, stderr=sink)
    try:
        while READY not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        while subprocess.run(["pgrep", "-f", "quartet::standby"], capture_output=True, check=False).returncode:
            time.sleep(0.1)
        outputs = []
        for block in tours(text):
            script = "\n".join([*(example.command for example in block), "wait"])
            done = subprocess.run(
                ["bash", "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, timeout=BLOCK_S, check=False,
            )  # fmt: skip
            outputs.append(done.stdout)
        return Tour(outputs, log.read_text())
    finally:
        server.terminate()
        server.wait(60)
        shutil.rmtree(runs, ignore_errors=True)


if __name__ == "__main__":
    start_loopback()
    Path(sys.argv[1]).write_text(json.dumps(run_tour(README.read_text(encoding="utf-8"))))
