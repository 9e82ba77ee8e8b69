"""Streamed tokens per second through the whole ring, with a scheduler that has no model.

    python deploy/benchmarks/ring_throughput.py [--streams 128] [--tokens 128] [--rounds 3] [--step-ms 0]

Real processes and sockets: gateway, tokenizer, a fake scheduler, detokenizer. The client reads every chunk of every
stream but parses none while the clock runs; afterwards it checks that each stream is whole. A gateway that falls behind
puts several tokens into one chunk: with --step-ms the scheduler is held back to a rate, and chunks per token say
whether the ring keeps up with it.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVED = re.compile(r"is served at http://([^:]+):(\d+)")
END = b"data: [DONE]"
CHUNK = b'"output_ids"'


@contextmanager
def server(flags: list[str], step_s: float) -> Iterator[tuple[str, int]]:
    """The launcher with the fake scheduler in its table; yields host and port."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "QUARTET_FAKE_STEP_S": str(step_s)}
    command = [sys.executable, "-m", "tests.launcher", "scheduler=tests.fake_scheduler", "--", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = next(match for line in process.stdout if (match := SERVED.search(line)))
        yield found[1], int(found[2])
    finally:
        process.terminate()
        process.wait(60)


async def stream(host: str, port: int, prompt: str, tokens: int) -> bytes:
    """The raw answer to one streamed request of exactly so many tokens."""
    params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
    body = json.dumps({"text": prompt, "stream": True, "sampling_params": params}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    return answer


def check(answer: bytes, tokens: int) -> int:
    """Number of chunks; the stream must be whole."""
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    assert END in answer and f'"completion_tokens":{tokens},'.encode() in answer, answer[-500:]
    return answer.count(CHUNK)


async def one_round(host: str, port: int, streams: int, tokens: int) -> tuple[float, int]:
    """Seconds until all streams have ended, and the chunks they had."""
    started = time.perf_counter()
    answers = await asyncio.gather(*(stream(host, port, f"Count from {i} on", tokens) for i in range(streams)))
    elapsed_s = time.perf_counter() - started
    return elapsed_s, sum(check(answer, tokens) for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=0.0, help="least time of a scheduler step")
    parser.add_argument("--incremental", action="store_true", help="stream deltas instead of cumulative text")
    options = parser.parse_args()
    flags = ["--log-level", "warning", *(["--incremental-streaming-output"] if options.incremental else [])]
    print("| round | streams | tokens each | tokens/s | chunks per token |\n|---|---|---|---|---|")
    with server(flags, options.step_ms / 1000) as (host, port):
        for number in range(1, options.rounds + 1):
            elapsed_s, chunks = asyncio.run(one_round(host, port, options.streams, options.tokens))
            made = options.streams * options.tokens
            share = chunks / made
            print(f"| {number} | {options.streams} | {options.tokens} | {made / elapsed_s:,.0f} | {share:.2f} |")


if __name__ == "__main__":
    main()
