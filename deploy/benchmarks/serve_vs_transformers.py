"""Quartet and transformers on the same random 0.5B model, one after the other in one run; prints ratios.

    python -m deploy.benchmarks.serve_vs_transformers [--dtypes bfloat16 float32] [--repeats 3] [--out result.json]

Quartet is measured from outside, over HTTP, as a client sees it. transformers is measured inside its own process,
without HTTP, in its two modes: `generate` and continuous batching (`generate_batch`). Both get the same token ids,
decode greedily and ignore the end-of-sequence id. Figures are medians of the repeats.
"""

import argparse
import http.client
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.benchmarks import half_billion

READY_TIMEOUT_S = 180


@dataclass(frozen=True)
class Load:
    """A set of requests that start together (rate 0) or one after the other at `rate` a second."""

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    shared_prefix: int = 0
    rate: float = 0.0
    heavy: bool = False  # measured once, however many repeats

    def prompts(self, repeat: int) -> list[list[int]]:
        draw = random.Random(f"{self.name}/{repeat}")
        prefix = [draw.randrange(1, half_billion.VOCAB) for _ in range(self.shared_prefix)]
        own = self.prompt_tokens - self.shared_prefix
        return [prefix + [draw.randrange(1, half_billion.VOCAB) for _ in range(own)] for _ in range(self.requests)]


LOADS = [
    Load("single stream", 1, 32, 64),
    Load("16 concurrent", 16, 256, 64, heavy=True),
    Load("64 concurrent", 64, 256, 64, heavy=True),
    Load("64 share a 1,024-token prefix", 64, 1056, 16, shared_prefix=1024, heavy=True),
    Load("steady arrivals", 12, 64, 8, rate=1.0, heavy=True),
]


@dataclass
class Trace:
    """When one request began and when its tokens came, in seconds."""

    started: float
    arrivals: list[float]

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0] - self.started


def figures(load: Load, traces: list[Trace]) -> dict[str, float]:
    """What is compared: decode tokens/s alone, output tokens/s together, time to first token under arrivals."""
    begin = min(t.started for t in traces)
    end = max(t.arrivals[-1] for t in traces)
    firsts = sorted(t.first_token_s for t in traces)
    decode = traces[0].arrivals
    return {
        "output_tokens_per_s": sum(len(t.arrivals) for t in traces) / (end - begin),
        "decode_tokens_per_s": (len(decode) - 1) / (decode[-1] - decode[0]) if decode[-1] > decode[0] else 0.0,
        "ttft_p50_s": statistics.median(firsts),
        "ttft_p99_s": firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))],
    }


# --- Quartet, over HTTP -------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A Quartet server in its own processes."""

    def __init__(self, model: Path, dtype: str, log: Path, *flags: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "quartet.launch_server", "--model-path", str(model), "--dtype", dtype]
        command += ["--port", str(self.port), "--max-total-tokens", "98304", "--max-running-requests", "128", *flags]
        self.log = log.open("w")
        self.process = subprocess.Popen(command, stderr=self.log, stdout=self.log)
        self._await_ready()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended at start; see {self.log.name}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise SystemExit("the server did not become ready")

    def post(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{path} answered {response.status}: {response.read()!r}")
        return response

    def stream(self, ids: list[int], new_tokens: int, delay_s: float) -> Trace:
        time.sleep(delay_s)
        params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        started = time.perf_counter()
        response = self.post("/generate", {"input_ids": ids, "sampling_params": params, "stream": True})
        arrivals: list[float] = []
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            done = json.loads(line[6:])["meta_info"]["completion_tokens"]
            arrivals += [time.perf_counter()] * (done - len(arrivals))
        if len(arrivals) != new_tokens:
            raise SystemExit(f"asked for {new_tokens} tokens, got {len(arrivals)}")
        return Trace(started, arrivals)

    def measure(self, load: Load, repeat: int) -> dict[str, float]:
        self.post("/flush_cache?timeout=10", {})
        prompts = load.prompts(repeat)
        gap_s = 1 / load.rate if load.rate else 0.0
        with ThreadPoolExecutor(load.requests) as pool:
            jobs = [pool.submit(self.stream, ids, load.new_tokens, i * gap_s) for i, ids in enumerate(prompts)]
            return figures(load, [job.result() for job in jobs])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


# --- transformers, in a process of its own ------------------------------------------------------------------------


class Clock:
    """A streamer for `generate`: notes when each token comes."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self._prompt_seen = False

    def put(self, _: Any) -> None:
        if self._prompt_seen:
            self.arrivals.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Part of the streamer interface; nothing is left to flush."""


def peer_generate(model: Any, load: Load, prompts: list[list[int]]) -> list[Trace]:
    """One static batch through `generate` (all prompts of a load have one length, so nothing is padded)."""
    import torch

    ids = torch.tensor(prompts)
    clock = Clock() if load.requests == 1 else None
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=load.new_tokens,
        min_new_tokens=load.new_tokens,
        do_sample=False,
        streamer=clock,
    )
    ended = time.perf_counter()
    if clock:
        return [Trace(started, clock.arrivals)]
    return [Trace(started, [ended] * load.new_tokens) for _ in prompts]


def peer_continuous(model: Any, load: Load, prompts: list[list[int]]) -> list[Trace]:
    """All prompts through the continuous-batching manager, streaming, arriving as the load says."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(max_new_tokens=load.new_tokens, do_sample=False, eos_token_id=-1)
    pages = -(-(load.prompt_tokens + load.new_tokens) // 16) * (load.requests + 1) + 64
    config = ContinuousBatchingConfig(page_size=16, num_blocks=pages, max_batch_tokens=2048)
    traces: dict[str, Trace] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, warmup=False
    ) as manager:
        left: set[str] = set()
        base = time.perf_counter()
        for index, prompt in enumerate(prompts):
            if load.rate:
                _collect(manager, traces, left, until=base + index / load.rate)
            name = f"{index}"
            traces[name] = Trace(time.perf_counter(), [])
            left.add(name)
            manager.add_request(prompt, request_id=name, max_new_tokens=load.new_tokens, streaming=True)
        _collect(manager, traces, left, until=None)
    return list(traces.values())


def _collect(manager: Any, traces: dict[str, Trace], left: set[str], until: float | None) -> None:
    """Note the arrival of every token until that moment, or (None) until no request is left."""
    while (time.perf_counter() < until) if until is not None else left:
        if (result := manager.get_result(timeout=0.01)) is None:
            continue
        trace = traces[result.request_id]
        trace.arrivals += [time.perf_counter()] * (len(result.generated_tokens) - len(trace.arrivals))
        if result.is_finished():
            left.discard(result.request_id)


def peer_main(model_dir: str, dtype: str, mode: str, load_json: str, repeat: int) -> None:
    """Child process: load the model, run one load in one mode, print its figures as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    load = Load(**json.loads(load_json))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    model.eval()
    run = {"generate": peer_generate, "continuous": peer_continuous}[mode]
    warm = Load("warm", 1, 16, 4)
    with torch.inference_mode():
        run(model, warm, warm.prompts(0))
        print(json.dumps(figures(load, run(model, load, load.prompts(repeat)))))


def measure_peer(model: Path, dtype: str, mode: str, load: Load, repeat: int, timeout_s: float) -> dict[str, float]:
    """Figures of one load, or {} when the peer exceeds the deadline or fails (its error is printed)."""
    command = [sys.executable, "-m", "deploy.benchmarks.serve_vs_transformers", "--peer", str(model), dtype, mode]
    command += [json.dumps(asdict(load)), str(repeat)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        print(f"  transformers {mode}: over {timeout_s:.0f} s on '{load.name}', given up", flush=True)
        return {}
    if done.returncode:
        print(f"  transformers {mode} failed on '{load.name}': {done.stderr[-600:]}", flush=True)
        return {}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


# --- the run ------------------------------------------------------------------------------------------------------


def median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    runs = [run for run in runs if run]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]} if runs else {}


METRIC = {"single stream": "decode_tokens_per_s", "steady arrivals": "ttft_p50_s"}


def compare(load: Load, ours: dict[str, float], peers: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One row: our figure, each peer's, and the ratio to the best peer (above 1 = we are ahead)."""
    metric = METRIC.get(load.name, "output_tokens_per_s")
    smaller_is_better = metric.startswith("ttft")
    values = {name: run[metric] for name, run in peers.items() if run}
    best = (min if smaller_is_better else max)(values.values(), default=0.0)
    ratio = (best / ours[metric] if smaller_is_better else ours[metric] / best) if best else None
    return {"load": load.name, "metric": metric, "quartet": ours[metric], **values, "ratio_to_best": ratio}


def run_dtype(dtype: str, loads: list[Load], repeats: int, work: Path, timeout_s: float) -> list[dict[str, Any]]:
    model = half_billion.build(work / f"half-billion-{dtype}", dtype)
    ours: dict[str, dict[str, float]] = {}
    server = Server(model, dtype, work / f"server-{dtype}.log")
    try:
        server.measure(Load("warm", 2, 16, 4), 0)
        for load in loads:
            ours[load.name] = median_of([server.measure(load, r) for r in range(1 if load.heavy else repeats)])
            print(f"  quartet {dtype} {load.name}: {ours[load.name]}", flush=True)
    finally:
        server.stop()
    rows = []
    for load in loads:
        modes = ["continuous"] if load.rate else ["generate", "continuous"]
        times = range(1 if load.heavy else repeats)
        peers = {
            f"transformers {mode}": median_of([measure_peer(model, dtype, mode, load, r, timeout_s) for r in times])
            for mode in modes
        }
        rows.append(
            {"dtype": dtype, **compare(load, ours[load.name], peers), "all": {"quartet": ours[load.name], **peers}}
        )
        print("  " + json.dumps({k: v for k, v in rows[-1].items() if k != "all"}), flush=True)
    return rows


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--loads", nargs="+", default=[load.name for load in LOADS], help="names of loads to run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds a peer may take for one load")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "quartet-benchmark")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    loads = [load for load in LOADS if load.name in arguments.loads]
    rows = [
        row
        for dtype in arguments.dtypes
        for row in run_dtype(dtype, loads, arguments.repeats, arguments.work, arguments.timeout)
    ]
    print(json.dumps(machine()))
    for row in rows:
        ratio = "-" if row["ratio_to_best"] is None else f"{row['ratio_to_best']:.2f}x"
        print(f"{row['dtype']:9} {row['load']:32} {row['metric']:20} {row['quartet']:10.2f}  vs best peer {ratio}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer_main(*sys.argv[2:6], repeat=int(sys.argv[6]))
    else:
        main()
