"""What constrained decoding costs: throughput of 16 streams with a JSON schema against the same without, and the delay
of the first token under a schema that is new to the server.

    python -m deploy.benchmarks.structured_output [--model DIR|demo|half-billion] [--streams 16] [--tokens 128]

Both runs make the same number of tokens: the schema is a list of strings, which no output completes, and the free run
ignores the end token. The runs alternate; the best round of each counts, so that a busy machine disturbs less.
"""

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import requests

from tests.servers import Server, launched

WAIT_S = 600
ROUNDS = 3
NEW_SCHEMAS = 20
HALF_BILLION = Path("/tmp/quartet-half-billion")
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


def throughput(server: Server, streams: int, params: dict[str, Any]) -> float:
    """Output tokens per second of concurrent requests."""
    made: list[int] = []
    threads = [threading.Thread(target=lambda: made.append(generate(server, params))) for _ in range(streams)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == streams, made
    return sum(made) / (time.monotonic() - started)


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


def run(model: str, streams: int, tokens: int) -> None:
    with launched("--model-path", model, "--log-level", "warning") as server:
        grammar = {"json_schema": json.dumps(ENDLESS), "max_new_tokens": tokens}
        free = {"max_new_tokens": tokens}
        for params in (grammar, free):
            throughput(server, streams, {**params, "max_new_tokens": 8})
        with_schema, without = [], []
        for _ in range(ROUNDS):
            without.append(throughput(server, streams, free))
            with_schema.append(throughput(server, streams, grammar))
        print(f"{streams} streams, {tokens} tokens each, {model}")
        print(f"  without: {max(without):8.1f} tokens/s   (rounds: {', '.join(f'{x:.1f}' for x in without)})")
        print(f"  schema:  {max(with_schema):8.1f} tokens/s   (rounds: {', '.join(f'{x:.1f}' for x in with_schema)})")
        print(f"  ratio:   {max(with_schema) / max(without):8.3f}")
        plain = [first_token_s(server, {}) for _ in range(NEW_SCHEMAS)]
        fresh = [first_token_s(server, {"json_schema": new_schema(i)}) for i in range(NEW_SCHEMAS)]
        delays = [(slow - statistics.median(plain)) * 1000 for slow in fresh]
        print(f"first token without a schema: median {statistics.median(plain) * 1000:.1f} ms")
        print(f"delay by a new schema: median {statistics.median(delays):.1f} ms, worst of {NEW_SCHEMAS} {max(delays):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    model = given.model
    if model == "half-billion":
        from deploy.benchmarks.half_billion import build

        model = str(build(HALF_BILLION, "bfloat16"))
    run(model, given.streams, given.tokens)


if __name__ == "__main__":
    main()
