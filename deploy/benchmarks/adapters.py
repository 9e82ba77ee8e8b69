"""What LoRA adapters cost: 16 streams on 4 adapters beside the same streams on the base, the base with and without
--enable-lora, and the gaps of 32 streams while an adapter is loaded.

    python -m deploy.benchmarks.adapters [--model DIR|half-billion] [--rank 16] [--adapters 4] [--streams 16]
                                         [--tokens 64] [--rounds 5]

Rounds alternate, those without adapters in turned order, and ratios are medians over neighbouring rounds. The adapters
change all linear layers of attention and feed-forward.
"""

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from deploy.benchmarks.structured_output import HALF_BILLION, Round, cpu_s
from tests.adapters import write_adapter
from tests.servers import Server, launched

WAIT_S = 600
PROMPT_IDS = list(range(100, 356))
LOADING_STREAMS = 32
LOADS = 5


def body(adapter: str | None, tokens: int, number: int) -> dict[str, Any]:
    params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return {"input_ids": [number + 10, *PROMPT_IDS], "sampling_params": params, "lora_path": adapter}


def run_round(server: Server, adapters: Sequence[str | None], streams: int, tokens: int) -> Round:
    """Concurrent requests, all together; the adapters in turn."""
    failed: list[str] = []

    def one(number: int, adapter: str | None) -> None:
        answer = requests.post(f"{server.url}/generate", json=body(adapter, tokens, number), timeout=WAIT_S)
        if not answer.ok:
            failed.append(answer.text)

    each = zip(range(streams), itertools.cycle(adapters), strict=False)
    threads = [threading.Thread(target=one, args=arguments) for arguments in each]
    started, cpu_before_s = time.monotonic(), cpu_s(server)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    made = streams * tokens
    return Round(made / (time.monotonic() - started), (cpu_s(server) - cpu_before_s) * 1000 / made)


def compare(title: str, pairs: list[tuple[Round, Round]]) -> None:
    """Print the rates of both sides and their ratio: second over first."""
    for kind, its_rounds in zip(("first", "second"), zip(*pairs, strict=True), strict=True):
        rate, cpu_ms = (statistics.median(values) for values in zip(*its_rounds, strict=True))
        print(f"  {kind:7} {rate:8.1f} tokens/s   {cpu_ms:6.3f} ms of CPU a token")
    rate = statistics.median(second[0] / first[0] for first, second in pairs)
    cpu = statistics.median(first[1] / second[1] for first, second in pairs)
    print(f"{title}: {rate:.3f} (CPU time: {cpu:.3f})", flush=True)


def largest_gaps(server: Server, adapter: Path) -> tuple[float, float]:
    """Largest gap between events of any of the streams, in seconds: undisturbed, and while adapters are loaded."""
    loading, gaps, done = threading.Event(), {False: 0.0, True: 0.0}, threading.Event()
    lock = threading.Lock()

    def stream(number: int) -> None:
        request = {**body(None, 4096, number), "stream": True}
        with requests.post(f"{server.url}/generate", json=request, timeout=WAIT_S, stream=True) as answer:
            last, during = time.monotonic(), loading.is_set()
            for line in answer.iter_lines():
                if done.is_set():
                    return
                if not line:
                    continue
                now, then = time.monotonic(), loading.is_set()
                with lock:
                    gaps[during or then] = max(gaps[during or then], now - last)
                last, during = now, then

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(LOADING_STREAMS)]
    for thread in threads:
        thread.start()
    time.sleep(10)  # prompts
    with lock:
        gaps[False] = 0.0
    time.sleep(10)
    for number in range(LOADS):
        loading.set()
        name = {"lora_name": f"late{number}", "lora_path": str(adapter)}
        answer = requests.post(f"{server.url}/load_lora_adapter", json=name, timeout=WAIT_S)
        assert answer.ok, answer.text
        time.sleep(0.5)
        loading.clear()
        time.sleep(1)
    done.set()
    for thread in threads:
        thread.join()
    return gaps[False], gaps[True]


def run(model: str, rank: int, count: int, streams: int, tokens: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        made = [write_adapter(Path(model), Path(name) / f"a{i}", rank, seed=i, size=0.05) for i in range(count)]
        names = [path.name for path in made]
        paths = [f"{path.name}={path}" for path in made]
        most = ("--max-loaded-loras", str(count + LOADS))
        common = ("--model-path", model, "--log-level", "warning")
        lora = ("--enable-lora", "--lora-paths", *paths, *most, "--max-loras-per-batch", str(count))
        print(f"{streams} streams, {tokens} tokens each, {count} adapters of rank {rank}, {model}; {rounds} rounds")
        with launched(*common) as plain, launched(*common, *lora) as server:
            for adapters in ([None], names):
                run_round(server, adapters, streams, 8)
            run_round(plain, [None], streams, 8)
            bases, ratios = [], []
            for number in range(rounds):
                first, second = (plain, server) if number % 2 else (server, plain)
                made_by = {one: run_round(one, [None], streams, tokens) for one in (first, second)}
                base = made_by[server]
                bases.append((made_by[plain], base))
                ratios.append((base, run_round(server, names, streams, tokens)))
            compare("base with --enable-lora over without", bases)
            compare("adapters over base", ratios)
            quiet_s, loading_s = largest_gaps(server, made[0])
            print(f"largest gap of {LOADING_STREAMS} streams: {quiet_s * 1000:.0f} ms", end="; ")
            print(f"while an adapter is loaded, {LOADS} times: {loading_s * 1000:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="half-billion")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    model = given.model
    if model == "half-billion":
        from deploy.benchmarks.half_billion import build

        model = str(build(HALF_BILLION, "bfloat16"))
    run(model, given.rank, given.adapters, given.streams, given.tokens, given.rounds)


if __name__ == "__main__":
    main()
