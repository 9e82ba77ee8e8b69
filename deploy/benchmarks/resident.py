"""What a server's processes take of the memory: when it is ready, with a full KV pool, after a first grammar.

    python -m deploy.benchmarks.resident --model-path FILE.gguf [--max-total-tokens 8192] [any flag of the server]

`anonymous` is memory that only this server has; what its processes share counts once. `files` are the resident pages
of libraries and other mapped files, which the system can drop: for each file those of the process that has the most of
it, as if nobody else used it. So the figures do not depend on what else runs on the machine.
"""

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from deploy.benchmarks.serve_vs_transformers import machine
from tests.servers import launched

FLAGS = ("--max-total-tokens", "8192", "--log-level", "warning")
READY_S = 600
WAIT_S = 600
PIECE_TOKENS = 1900  # of a prompt
LAST_ID = 2000  # of the tokens that prompts are made of: every tokenizer has so many
SCHEMA = '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'


@dataclass(frozen=True, slots=True)
class Resident:
    """The resident memory of one process, or of several, in bytes."""

    name: str
    anonymous: int
    files: dict[str, int]  # by path

    @property
    def all(self) -> int:
        return self.anonymous + sum(self.files.values())


def of_server(pid: int) -> list[Resident]:
    """The launcher, whose process id that is, and all processes that it has started, directly or not."""
    launcher = psutil.Process(pid)
    return [of_process(process) for process in (launcher, *launcher.children(recursive=True))]


def of_process(process: psutil.Process) -> Resident:
    rollup = sizes_in(Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:])
    command = process.cmdline()
    name = (
        command[0] if len(command) == 1 else next((part for part in command if part.startswith("quartet.")), command[0])
    )
    return Resident(name, rollup["Pss_Anon"] + rollup["Pss_Shmem"], files_of(process.pid))


def files_of(pid: int) -> dict[str, int]:
    """Path → bytes of the resident pages that are the file's own, not copies of the process."""
    found: Counter[str] = Counter()
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE):
        head, _, rest = mapping.partition("\n")
        if (path := head[73:].strip()).startswith("/") and not path.startswith(("/dev/", "/memfd:")):
            sizes = sizes_in(rest.splitlines())
            found[path] += sizes["Rss"] - sizes["Anonymous"]
    return dict(found)


def sizes_in(lines: list[str]) -> dict[str, int]:
    """What lines such as `Rss: 12 kB` say, in bytes."""
    pairs = ((name, rest.split()) for name, _, rest in (line.partition(":") for line in lines))
    return {name: int(rest[0]) << 10 for name, rest in pairs if rest[1:] == ["kB"]}


def whole(parts: list[Resident]) -> Resident:
    """All of them together."""
    files = {
        path: max(part.files.get(path, 0) for part in parts) for path in set().union(*(part.files for part in parts))
    }
    return Resident("all", sum(part.anonymous for part in parts), files)


def fill_pool(url: str) -> None:
    """Have the server compute as many different tokens as its KV pool holds."""
    tokens = requests.get(f"{url}/get_server_info", timeout=WAIT_S).json()["max_total_num_tokens"]
    for first in range(0, tokens, PIECE_TOKENS):
        ids = [3 + (first + place) % LAST_ID for place in range(PIECE_TOKENS)]
        send(url, "generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}})


def ask_for_json(url: str) -> None:
    """Have it answer by a schema, for which it loads what grammars need."""
    send(url, "generate", {"text": "Hello", "sampling_params": {"max_new_tokens": 8, "json_schema": SCHEMA}})


def send(url: str, route: str, body: dict[str, object]) -> None:
    requests.post(f"{url}/{route}", json=body, timeout=WAIT_S).raise_for_status()


def table(parts: list[Resident]) -> str:
    lines = [f"{'MB':50}{'all':>8}{'anonymous':>11}{'files':>8}"]
    for part in (*parts, whole(parts)):
        files = part.all - part.anonymous
        lines.append(f"{part.name[:48]:50}{part.all / 1e6:8.1f}{part.anonymous / 1e6:11.1f}{files / 1e6:8.1f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model-path", required=True)
    given, flags = parser.parse_known_args()
    with launched("--model-path", given.model_path, *FLAGS, *flags, ready=False, standby=True) as server:
        server.wait_for("Ctrl-C stops it.", READY_S)
        print(
            f"{given.model_path} {' '.join(flags)}; {machine()['cpu']}\nready:\n{table(of_server(server.process.pid))}"
        )
        fill_pool(server.url)
        print(f"when the KV pool was full:\n{table(of_server(server.process.pid))}")
        ask_for_json(server.url)
        print(f"after an answer by a schema:\n{table(of_server(server.process.pid))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
