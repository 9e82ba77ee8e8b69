"""Quartet beside other servers on this machine: the same model, the same prompts, one server at a time; prints ratios.

    python -m deploy.benchmarks.peers [--model DIR|FILE.gguf|half-billion] [--rounds 3] [--out result.json] \\
        [--vllm BIN/vllm] [--sglang BIN/python] [--llama-server BIN/llama-server --llama-files X.gguf …] \\
        [--environment vllm:LD_PRELOAD=… sglang:PYTHONPATH=…] [--flags "vllm:--enforce-eager" …] \\
        [--variants "int8:--quantization int8" …]

A variant is Quartet with more flags, beside the plain one.

In every round each server is started, waited for, warmed up, measured under every load and stopped; the order turns
from round to round, so that a machine that changes its speed changes it for all. Figures are taken by the client: wall
clock, tokens counted by the server, and a request that did not end with the asked number of tokens fails the visit. The
client shares the cores. A peer whose program is not there is named and left out, as are servers of model directories
for a GGUF file. Run it when nothing else runs: the load of the machine before each visit is in the result, and how fast
memory was before and behind it. Where memory changed its speed, ratios of single streams say little.
"""

import argparse
import http.client
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deploy.benchmarks import half_billion
from deploy.benchmarks.serve_vs_transformers import free_port, machine
from deploy.benchmarks.structured_output import HALF_BILLION

READY_S, REQUEST_S, STOP_S = 420, 600, 40
READ_BYTES, READS = 1 << 29, 5
FIRST_ID, LAST_ID = 1000, 150_000
MOST_RUNNING, POOL_TOKENS = 64, 98_304


class Load(NamedTuple):
    """Requests that begin together."""

    name: str
    requests: int
    own_tokens: int  # of each prompt
    shared_tokens: int  # before them
    output: int
    figure: str  # of `figures`, the one that ratios are made of

    def prompts(self, round: int) -> list[list[int]]:
        """The same ones for every server, others in each round."""
        draw = random.Random(f"{self.name}/{round}")
        shared = [draw.randrange(FIRST_ID, LAST_ID) for _ in range(self.shared_tokens)]
        own = range(self.own_tokens)
        return [shared + [draw.randrange(FIRST_ID, LAST_ID) for _ in own] for _ in range(self.requests)]


LOADS = (
    Load("single stream", 1, 128, 0, 128, "decode tok/s"),
    Load("prefill 512", 1, 512, 0, 1, "prompt tok/s"),
    Load("16 concurrent", 16, 256, 0, 64, "output tok/s"),
    Load("64 concurrent", 64, 256, 0, 64, "output tok/s"),
    Load("64 share 1,024", 64, 32, 1024, 16, "output tok/s"),
)
WARM_UP = (
    Load("warm-up, one", 1, 600, 0, 4, "output tok/s"),
    Load("warm-up, many", MOST_RUNNING, 16, 0, 4, "output tok/s"),
)


class Api(NamedTuple):
    """How a server is asked for a stream of greedy tokens that ignores the end, and how an event counts them."""

    path: str
    body: Callable[[list[int], int], dict[str, Any]]
    tokens: Callable[[dict[str, Any]], int | None]  # so far, or None where the event does not say


def native_body(ids: list[int], output: int) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
    return {"input_ids": ids, "sampling_params": params, "stream": True}


def openai_body(ids: list[int], output: int) -> dict[str, Any]:
    body = {"model": "m", "prompt": ids, "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True}
    return body | {"stream_options": {"include_usage": True}}


def llama_body(ids: list[int], output: int) -> dict[str, Any]:
    return {"prompt": ids, "n_predict": output, "temperature": 0, "ignore_eos": True, "stream": True}


NATIVE = Api("/generate", native_body, lambda event: event["meta_info"]["completion_tokens"])
OPENAI = Api("/v1/completions", openai_body, lambda event: (event.get("usage") or {}).get("completion_tokens"))
LLAMA = Api("/completion", llama_body, lambda event: event.get("tokens_predicted") or None)


@dataclass
class Peer:
    """A server program. `missing` says why it is left out."""

    name: str
    command: str  # with {port}
    api: Api
    missing: str = ""
    environment: dict[str, str] = field(default_factory=dict)


class Trace(NamedTuple):
    """One request: seconds of its start, its first and its last event with tokens; tokens of the first, and all."""

    started: float
    first: float
    last: float
    first_tokens: int
    tokens: int


def ask(port: int, api: Api, ids: list[int], output: int) -> Trace:
    """Stream one request to its end. Raises RuntimeError where it ends otherwise than with `output` tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_S)
    body = json.dumps(api.body(ids, output))
    started = time.perf_counter()
    connection.request("POST", api.path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:300]!r}")
    first = last = 0.0
    first_tokens, tokens = 1, 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        now, event = time.perf_counter(), json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"{event['error']}")
        found = api.tokens(event)
        if not first:
            first, first_tokens = now, found or 1
        tokens = found or tokens
        if event.get("choices", True):  # the event that has the usage alone brings no token
            last = now
    connection.close()
    if tokens != output:
        raise RuntimeError(f"asked for {output} tokens, got {tokens}")
    return Trace(started, first, last, first_tokens, tokens)


def figures(load: Load, traces: list[Trace]) -> dict[str, float]:
    """What is compared, of all requests of a load."""
    seconds = max(trace.last for trace in traces) - min(trace.started for trace in traces)
    waits = [trace.first - trace.started for trace in traces]
    found = {"output tok/s": sum(trace.tokens for trace in traces) / seconds, "TTFT p50 s": statistics.median(waits)}
    if load.requests == 1:
        (trace,) = traces
        found["prompt tok/s"] = (load.own_tokens + load.shared_tokens) / waits[0]
        if trace.tokens > trace.first_tokens:
            found["decode tok/s"] = (trace.tokens - trace.first_tokens) / (trace.last - trace.first)
    return found


def measure(port: int, api: Api, load: Load, round: int) -> dict[str, float]:
    with ThreadPoolExecutor(load.requests) as pool:
        jobs = [pool.submit(ask, port, api, ids, load.output) for ids in load.prompts(round)]
        return figures(load, [job.result() for job in jobs])


@contextmanager
def serving(peer: Peer, log: Path) -> Any:
    """Start a peer; gives (port, seconds until it is ready) and ends all of its processes. RuntimeError if it fails."""
    port, begun = free_port(), time.monotonic()
    command = shlex.split(peer.command.format(port=port))
    with log.open("a") as out:
        out.write(f"{shlex.join(command)}\n")
        out.flush()
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **peer.environment}, start_new_session=True
        )
    try:
        while not healthy(port):
            if process.poll() is not None or time.monotonic() - begun > READY_S:
                raise RuntimeError(f"{peer.name} did not become ready, see {log}")
            time.sleep(0.1)
        yield port, time.monotonic() - begun
    finally:
        stop(process)


def healthy(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and whatever is left of its process group."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def memory_speed() -> float:
    """GB/s at which all cores together read memory now. On a shared machine a single stream follows it up and down."""
    numbers = torch.ones(READ_BYTES // 4)
    took = []
    for _ in range(READS):
        begin = time.perf_counter()
        numbers.sum()
        took.append(time.perf_counter() - begin)
    return READ_BYTES / 1e9 / statistics.median(took)


def visit(peer: Peer, loads: list[Load], round: int, log: Path) -> dict[str, Any]:
    """All figures of one start of a peer: {load: {figure: value}}, "start to ready s" and what the machine was like."""
    load_before, memory = os.getloadavg()[0], [memory_speed()]
    with serving(peer, log) as (port, ready_s):
        for warm_up in WARM_UP:
            measure(port, peer.api, warm_up, round)
        found = {load.name: measure(port, peer.api, load, round) for load in loads}
    memory.append(memory_speed())
    return {"load before": load_before, "memory GB/s": memory, "start": {"start to ready s": ready_s}, **found}


def rows(visits: dict[str, list[dict[str, Any]]], loads: list[Load]) -> list[dict[str, Any]]:
    """Medians of each server, and how many times better the first one is than each other."""
    wanted = [(load.name, load.figure) for load in loads]
    wanted += [(load.name, "TTFT p50 s") for load in loads if load.requests > 1] + [("start", "start to ready s")]
    found = []
    for load, figure in wanted:
        values = {name: [run[load][figure] for run in runs if load in run] for name, runs in visits.items()}
        medians = {name: statistics.median(its) for name, its in values.items() if its}
        base = medians.get(next(iter(visits)))
        ratios = {}
        for name, value in list(medians.items())[1:] if base else ():
            ratios[name] = base / value if figure.endswith("tok/s") else value / base
        found.append({"load": load, "figure": figure, "medians": medians, "ratios": ratios, "all": values})
    return found


def table(found: list[dict[str, Any]], names: list[str]) -> str:
    lines = [f"{'median (times better is the first)':38}" + "".join(f"{name:>26}" for name in names)]
    for row in found:
        cells = []
        for name in names:
            ratio = f" ({row['ratios'][name]:.2f}x)" if name in row["ratios"] else ""
            cells.append(f"{row['medians'][name]:.4g}{ratio}" if name in row["medians"] else "-")
        lines.append(f"{row['load'] + ', ' + row['figure']:38}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def known_peers(model: Path, given: argparse.Namespace) -> list[Peer]:
    """Quartet and all peers, with the reason for those that are left out."""
    running, threads = MOST_RUNNING, os.cpu_count() or 1
    files = "serves no GGUF file here" if model.suffix == ".gguf" else ""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quartet = (
        f"{sys.executable} -m quartet.launch_server --model-path {model} --port {{port}} --log-level warning "
        f"--max-running-requests {running} --max-total-tokens {POOL_TOKENS}"
    )
    vllm = (
        f"{given.vllm} serve {model} --host 127.0.0.1 --port {{port}} --dtype bfloat16 --max-model-len 4096 "
        f"--max-num-seqs {running} --served-model-name m"
    )
    sglang = (
        f"{given.sglang} -m sglang.launch_server --model-path {model} --host 127.0.0.1 --port {{port}} --device cpu "
        f"--dtype bfloat16 --max-total-tokens {POOL_TOKENS} --max-running-requests {running} --skip-server-warmup "
        "--attention-backend torch_native --sampling-backend pytorch --disable-overlap-schedule"
    )
    vllm_environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    vllm_environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    peers = [
        Peer("quartet", quartet, NATIVE, "", offline),
        Peer("vllm", vllm, OPENAI, files or absent(given.vllm), offline | vllm_environment),
        Peer("sglang", sglang, NATIVE, files or absent(given.sglang), offline | {"SGLANG_USE_CPU_ENGINE": "1"}),
    ]
    for name, _, more in (variant.partition(":") for variant in given.variants):
        peers.append(Peer(f"quartet {name}", f"{quartet} {more}", NATIVE, "", offline))
    ggufs = given.llama_files or ([model] if model.suffix == ".gguf" else [])
    for file in ggufs:
        command = (
            f"{given.llama_server} -m {file} --host 127.0.0.1 --port {{port}} -t {threads} -tb {threads} "
            f"-np {running} -c {POOL_TOKENS} --kv-unified -b 2048 -ub 512"
        )
        peers.append(Peer(f"llama.cpp {file.stem[-16:]}", command, LLAMA, absent(given.llama_server)))
    if not ggufs:
        peers.append(Peer("llama.cpp", "", LLAMA, "--llama-files names no GGUF file of the model"))
    return [with_more(peer, given.environment, given.flags) for peer in peers]


def absent(program: str) -> str:
    return "" if shutil.which(program) else f"{program} is not there"


def with_more(peer: Peer, environment: list[str], flags: list[str]) -> Peer:
    """A peer with what the command line adds to its variables and flags, as PEER:NAME=VALUE and PEER:FLAGS."""
    short = peer.name.split()[0]
    for name, _, setting in (entry.partition(":") for entry in environment):
        if name == short:
            variable, _, value = setting.partition("=")
            peer.environment = peer.environment | {variable: value}
    for name, _, more in (entry.partition(":") for entry in flags):
        if name == short:
            peer.command += f" {more}"
    return peer


def run(peers: list[Peer], loads: list[Load], rounds: int, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Visits by name of peer. A visit that fails is said and counts for nothing."""
    visits: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for round in range(rounds):
        turn = round % len(peers)
        for peer in peers[turn:] + peers[:turn]:
            try:
                found = visit(peer, loads, round, work / f"{peer.name.replace(' ', '-')}.log")
            except (RuntimeError, OSError) as error:
                print(f"  round {round}, {peer.name}: {error}", flush=True)
                continue
            visits[peer.name].append(found)
            print(f"  round {round}, {peer.name}: {json.dumps(found)}", flush=True)
    return visits


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="half-billion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", nargs="+", default=[load.name for load in LOADS])
    parser.add_argument("--peers", nargs="+", help="only these, by the beginning of their names")
    parser.add_argument("--vllm", default="vllm", help="the program of vLLM's CPU build")
    parser.add_argument("--sglang", default="sglang-python", help="the python that has SGLang")
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--llama-files", type=Path, nargs="*", default=[], help="GGUF files of the same model")
    parser.add_argument("--environment", nargs="*", default=[], help="PEER:NAME=VALUE")
    parser.add_argument("--flags", nargs="*", default=[], help="PEER:FLAGS")
    parser.add_argument("--variants", nargs="*", default=[], help="NAME:FLAGS, more servers of Quartet")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "quartet-peers")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parsed(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    is_path = given.model != "half-billion"
    model = Path(given.model) if is_path else half_billion.build(HALF_BILLION, "bfloat16")
    peers = []
    for peer in known_peers(model, given):
        if given.peers and not peer.name.startswith(("quartet", *given.peers)):
            continue
        if peer.missing:
            print(f"{peer.name} is left out: {peer.missing}")
        else:
            peers.append(peer)
    loads = [load for load in LOADS if load.name in given.loads]
    before = machine()
    visits = run(peers, loads, given.rounds, given.work)
    found = rows(visits, loads)
    print(json.dumps(before))
    print(table(found, [peer.name for peer in peers]))
    if given.out:
        commands = {peer.name: peer.command for peer in peers}
        result = {"machine": before, "commands": commands, "rows": found, "visits": visits}
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(not all(visits.values()))


if __name__ == "__main__":
    sys.exit(main())
