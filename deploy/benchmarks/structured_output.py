"""What constrained decoding costs: throughput of streams with a JSON schema against the same without, and the delay
of the first token under a schema that is new to the server. The same with drafts (--speculative-algorithm NGRAM).

    python -m deploy.benchmarks.structured_output [--model DIR|demo|half-billion|small] [--streams 16]
                                                  [--tokens 128] [--rounds 7]
    python -m deploy.benchmarks.structured_output --model small --streams 1 2 4       # steps of about 4 ms on a CPU
    python -m deploy.benchmarks.structured_output --same-text --streams 1 2 4         # the same text with and without
    python -m deploy.benchmarks.structured_output --step-ms 4 --streams 1 4 16 64     # on a device, beside the CPU

`small` is random, with Qwen's vocabulary of 151,936 tokens and a body of --hidden and --layers. What it writes freely
is another text than what it writes under a schema, and how often a draft of it is right is chance: see the tokens of a
step. With --same-text a scheduler in this process serves the small model, and each request writes a given text under
the schema and without (written_text.py). With --step-ms, steps take that long on a device that leaves the CPU free
(paced_device.py), and a draw behind a mask --draw-ms; the texts are the same there too.

Both runs make the same number of tokens: the schema's list is longer than any output, and the free run ignores the end
token. The runs alternate, and ratios are medians over neighbouring rounds, so that a busy machine disturbs less; least
of all it disturbs the CPU time that the server's processes take for a token.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import requests

from deploy.benchmarks import small_model
from deploy.benchmarks.paced_device import PacedScheduler
from deploy.benchmarks.written_text import LoneScheduler, Round, WritingScheduler
from tests.servers import Server, launched

WAIT_S = 600
NEW_SCHEMAS = 20
HALF_BILLION = Path("/tmp/quartet-half-billion")
SMALL = "/tmp/quartet-small"
PROMPT = "Write a list of the capitals of Europe."
ENDLESS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "people": {"type": "integer"}, "coast": {"type": "boolean"}},
        "required": ["city", "people", "coast"],
        "additionalProperties": False,
    },
    "minItems": 10_000,
}


def generate(server: Server, params: dict[str, Any]) -> int:
    """Output tokens of one request."""
    body = {"text": PROMPT, "sampling_params": {"temperature": 0.8, "ignore_eos": True, **params}}
    answer = requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S)
    answer.raise_for_status()
    tokens: int = answer.json()["meta_info"]["completion_tokens"]
    return tokens


def run_round(server: Server, streams: int, params: dict[str, Any]) -> Round:
    made: list[int] = []
    threads = [threading.Thread(target=lambda: made.append(generate(server, params))) for _ in range(streams)]
    started, cpu_before_s = time.monotonic(), cpu_s(server)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == streams, made
    tokens = sum(made)
    return Round(tokens / (time.monotonic() - started), (cpu_s(server) - cpu_before_s) * 1000 / tokens)


def cpu_s(server: Server) -> float:
    """CPU time that the server's processes have taken."""
    times = [process.cpu_times() for process in psutil.Process(server.process.pid).children(recursive=True)]
    return sum(time.user + time.system for time in times)


def first_token_s(server: Server, params: dict[str, Any]) -> float:
    """From the request to the first event of its stream."""
    body = {"text": PROMPT, "stream": True, "sampling_params": {"max_new_tokens": 2, "ignore_eos": True, **params}}
    started = time.monotonic()
    with requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S, stream=True) as answer:
        answer.raise_for_status()
        next(answer.iter_lines())
        return time.monotonic() - started


def new_schema(number: int) -> str:
    fields = {f"field_{number}_{i}": {"type": ["string", "integer"]} for i in range(6)}
    return json.dumps({"type": "object", "properties": fields, "required": list(fields), "minItems": number})


def compare(serve: Callable[[dict[str, Any]], Round], streams: int, tokens: int, rounds: int, name: str) -> None:
    """Print the rates of the same batch without and with a grammar, in turn, and their ratios."""
    free: dict[str, Any] = {"max_new_tokens": tokens}
    grammar = {"json_schema": json.dumps(ENDLESS), **free}
    for params in (grammar, free):
        serve({**params, "max_new_tokens": min(tokens, 8)})
    pairs = [(serve(free), serve(grammar)) for _ in range(rounds)]
    for kind, its_rounds in zip(("free", "schema"), zip(*pairs, strict=True), strict=True):
        rate, cpu_ms = (statistics.median(values) for values in zip(*its_rounds, strict=True))
        step = f"{streams * 1000 / rate:6.2f} ms for a token of each"
        print(f"  {name:8} {streams:3} streams {kind:7} {rate:8.1f} tokens/s {step}   {cpu_ms:6.3f} ms of CPU a token")
    rate, cpu = (statistics.median(with_it[i] / without[i] for without, with_it in pairs) for i in range(2))
    print(f"  {name:8} {streams:3} streams ratio   {rate:8.3f} {'':31} {cpu:6.3f}", flush=True)


def delays_of_new_schemas(server: Server) -> None:
    """Print how much later the first token comes under a schema that is new."""
    waits = [
        (first_token_s(server, {}), first_token_s(server, {"json_schema": new_schema(number)}))
        for number in range(NEW_SCHEMAS)
    ]
    delays = [(fresh - plain) * 1000 for plain, fresh in waits]
    print(f"first token without a schema: median {statistics.median(plain for plain, _ in waits) * 1000:.1f} ms")
    worst = f"worst of {NEW_SCHEMAS} {max(delays):.1f} ms"
    print(f"delay by a new schema: median {statistics.median(delays):.1f} ms, {worst}")


def run(model: str, streams: list[int], tokens: int, rounds: int) -> None:
    print(f"{tokens} tokens each, {model}; medians of {rounds} rounds")
    for name, flags in (("plain", ()), ("drafts", ("--speculative-algorithm", "NGRAM"))):
        with launched("--model-path", model, "--log-level", "warning", *flags) as server:
            for count in streams:
                compare(partial(run_round, server, count), count, tokens, rounds, name)
            if not flags:
                delays_of_new_schemas(server)


def run_alone(
    make: Callable[[int, bool], LoneScheduler], where: str, streams: list[int], tokens: int, rounds: int
) -> None:
    """The same of schedulers in this process. `make`: one for so many streams, with drafts or without."""
    print(f"{tokens} tokens each, {where}; medians of {rounds} rounds")
    for name, drafts in (("plain", False), ("drafts", True)):
        for count in streams:
            scheduler = make(count, drafts)
            compare(scheduler.run, count, tokens, rounds, name)
            scheduler.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=128, help="of the small model")
    parser.add_argument("--layers", type=int, default=8, help="of the small model")
    parser.add_argument("--step-ms", type=float, help="steps of a device beside the CPU; with a small model")
    parser.add_argument("--draw-ms", type=float, default=0.1, help="of a draw behind a mask, where --step-ms is given")
    parser.add_argument("--same-text", action="store_true", help="a scheduler of the small model in this process")
    given = parser.parse_args()
    model, measured = given.model, (given.streams, given.tokens, given.rounds)
    if model == "half-billion":
        from deploy.benchmarks.half_billion import build

        model = str(build(HALF_BILLION, "bfloat16"))
    if model == "small" or given.same_text or given.step_ms is not None:
        model = str(small_model.build(Path(f"{SMALL}-{given.hidden}-{given.layers}"), given.hidden, given.layers))
    if given.step_ms is not None:
        paced = (given.step_ms / 1000, given.draw_ms / 1000)
        where = f"a device on which a step takes {given.step_ms} ms and a draw behind a mask {given.draw_ms}"
        run_alone(lambda n, drafts: PacedScheduler(Path(model), n, given.tokens, drafts, *paced), where, *measured)
    elif given.same_text:
        where = "small model, the same text with a schema and without"
        run_alone(lambda n, drafts: WritingScheduler(Path(model), n, given.tokens, drafts), where, *measured)
    else:
        run(model, *measured)


if __name__ == "__main__":
    main()
