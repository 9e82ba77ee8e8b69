"""What --enable-deterministic-inference costs, and what it gives: two servers side by side, one with it.

    python -m deploy.benchmarks.deterministic [--model DIR|demo|half-billion] [--rounds 5]

For each of three loads the servers take turns, and the ratio is the median over the rounds. Then every answer of the
concurrent load is asked for once more, alone: how many have the same tokens, and how many the same bits of logprobs.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from deploy.benchmarks.structured_output import HALF_BILLION
from tests.servers import Server, launched

WAIT_S = 600
CONCURRENT = 16
PROMPT, LONG_PROMPT, OUTPUT = 128, 512, 24


def body(seed: int, length: int, output: int) -> dict[str, Any]:
    draw = random.Random(seed)
    params = {"temperature": seed % 2, "sampling_seed": seed, "max_new_tokens": output, "ignore_eos": True}
    ids = [draw.randrange(10, 500) for _ in range(length)]
    return {"input_ids": ids, "sampling_params": params, "return_logprob": True}


def answer(server: Server, request: dict[str, Any]) -> list[Any]:
    """Ids and logprobs of the output."""
    said = requests.post(f"{server.url}/generate", json=request, timeout=WAIT_S)
    said.raise_for_status()
    triples: list[Any] = said.json()["meta_info"]["output_token_logprobs"]
    return [triple[:2] for triple in triples]


def together(server: Server, bodies: list[dict[str, Any]]) -> list[list[Any]]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda request: answer(server, request), bodies))


def flush(server: Server) -> None:
    requests.post(f"{server.url}/flush_cache", timeout=WAIT_S).raise_for_status()


LOADS: dict[str, Callable[[Server, int], Any]] = {
    "one stream": lambda server, round: answer(server, body(round, 8, 2 * OUTPUT)),
    f"prompt of {LONG_PROMPT}": lambda server, round: answer(server, body(round, LONG_PROMPT, 1)),
    f"{CONCURRENT} at once": lambda server, round: together(
        server, [body(100 * round + i, PROMPT, OUTPUT) for i in range(CONCURRENT)]
    ),
}


def seconds(load: Callable[[Server, int], Any], server: Server, round: int) -> float:
    flush(server)
    begun = time.monotonic()
    load(server, round)
    return time.monotonic() - begun


def compare(plain: Server, promised: Server, rounds: int) -> None:
    for name, load in LOADS.items():
        times = [(seconds(load, plain, i), seconds(load, promised, i)) for i in range(rounds + 1)][1:]
        without, with_it = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        print(f"{name:>16}: {without:7.3f} s without, {with_it:7.3f} s with it, ratio {ratio:.2f}")
    bodies = [body(1000 + i, PROMPT, OUTPUT) for i in range(CONCURRENT)]
    for name, server in (("without", plain), ("with it", promised)):
        found = together(server, bodies)
        flush(server)
        alone = [answer(server, request) for request in bodies]
        bits = sum(one == other for one, other in zip(found, alone, strict=True))
        tokens = sum([id for _, id in one] == [id for _, id in other] for one, other in zip(found, alone, strict=True))
        print(f"{name}: {tokens} of {CONCURRENT} have the same tokens alone, {bits} the same bits of logprobs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="half-billion")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    model = given.model
    if model == "half-billion":
        from deploy.benchmarks.half_billion import build

        model = str(build(HALF_BILLION, "bfloat16"))
    flags = ("--model-path", model, "--dtype", "bfloat16", "--log-level", "warning", "--disable-standby")
    flags += ("--max-total-tokens", "16384")
    with launched(*flags) as plain, launched(*flags, "--enable-deterministic-inference") as promised:
        compare(plain, promised, given.rounds)


if __name__ == "__main__":
    main()
